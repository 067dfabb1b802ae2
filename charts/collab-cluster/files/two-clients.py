"""Makes a document over REST, joins it with two clients that type at once, and expects both edits in both clients and
in the document, saved. Usage: two-clients.py HOST [FILE WITH THE SECRET OF CLIENT TOKENS]"""

import base64
import hashlib
import hmac
import json
import pathlib
import sys
import time
import urllib.error
import urllib.request
import uuid

import websocket

host = sys.argv[1]
document = f"helm-test-{uuid.uuid4()}"


def token(secret):
    def part(data):
        return base64.urlsafe_b64encode(data).rstrip(b"=")

    claims = {"sub": "helm-test", "exp": int(time.time()) + 600, "documents": [document]}
    signed = b".".join(part(json.dumps(piece).encode()) for piece in ({"alg": "HS256", "typ": "JWT"}, claims))
    return (signed + b"." + part(hmac.new(secret, signed, hashlib.sha256).digest())).decode()


bearer = token(pathlib.Path(sys.argv[2]).read_bytes().strip()) if len(sys.argv) > 2 else ""


def rest(method, path, body=None):
    request = urllib.request.Request(f"http://{host}/api/v1/documents{path}", method=method)
    request.add_header("Authorization", f"Bearer {bearer}")
    if body is not None:
        request.add_header("Content-Type", "application/json")
        request.data = json.dumps(body).encode()
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode()


def typing(client, text):
    """The Yjs update by which a client with this small id inserts an ASCII text at the start of Y.Text `quill`."""

    def string(value):
        return bytes([len(value)]) + value.encode()

    # One client, one struct from clock 0: a string without neighbours in the root type; nothing deleted.
    return bytes([1, 1, client, 0, 4, 1]) + string("quill") + string(text) + bytes([0])


class Client:
    """One y-websocket client, as far as this test needs it."""

    SAVED = bytes([102, 1, 7])

    def __init__(self):
        self.socket = websocket.create_connection(f"ws://{host}/ws/{document}?token={bearer}", timeout=20)
        self.got = []
        # Sync step 1 of an empty document, and the step 2 that the server is waiting for.
        self.socket.send_binary(bytes([0, 0, 1, 0]))
        self.socket.send_binary(bytes([0, 1, 2, 0, 0]))

    def type(self, client, text):
        update = typing(client, text)
        self.socket.send_binary(bytes([0, 2, len(update)]) + update)
        # Comes back once all of the above is saved.
        self.socket.send_binary(self.SAVED)

    def until(self, what):
        while not any(what in message for message in self.got):
            self.got.append(self.socket.recv())


for attempt in range(30):
    try:
        rest("POST", "", {"id": document})
        break
    except urllib.error.HTTPError as error:
        sys.exit(f"the document was refused: {error} {error.read().decode()}")
    except OSError as error:
        print(f"{host}: {error}")
        time.sleep(1)
else:
    sys.exit(f"{host} does not answer")

first, second = Client(), Client()
first.type(1, "from the first")
second.type(2, "from the second")
for client in (first, second):
    client.until(b"from the first")
    client.until(b"from the second")
    client.until(Client.SAVED)
saved = rest("GET", f"/{document}/text?name=quill")
print(f"{document}: {saved!r}")
rest("DELETE", f"/{document}")
if saved not in ("from the firstfrom the second", "from the secondfrom the first"):
    sys.exit("the document does not hold exactly the two edits")
