/**
 * What the scripts share: a stock Yjs client, receipts for its edits, and how a script speaks to the
 * test that started it (options as JSON in the first argument, JSON lines out, `stop` on stdin).
 *
 * Nothing here reads the code of the server or of the page: it knows them by their protocol only.
 */
import { createHash } from 'node:crypto'
import { once } from 'node:events'
import { createInterface } from 'node:readline'
import * as decoding from 'lib0/decoding'
import * as encoding from 'lib0/encoding'
import WebSocket from 'ws'
import { WebsocketProvider } from 'y-websocket'
import * as Y from 'yjs'

// Stdout is for events; libraries that want to say something do it beside them.
console.log = console.error
// Each client listens for the end of the process.
process.setMaxListeners(0)

const MESSAGE_SYNC = 0
const SYNC_UPDATE = 2
const MESSAGE_AUTH = 2
const MESSAGE_RECEIPT = 102

/** The options that the test gave, over `defaults`. */
export const options = defaults => ({ ...defaults, ...JSON.parse(process.argv[2] ?? '{}') })

/** Writes one event. Waits when the reader is slow, so that nothing piles up here. */
export const print = async event => {
  if (!process.stdout.write(JSON.stringify(event) + '\n')) await once(process.stdout, 'drain')
}

/** Ends the script once all that it printed is out. */
export const leave = async () => {
  await new Promise(resolve => process.stdout.write('', resolve))
  process.exit(0)
}

/** Milliseconds since 1970, and yet never going back. */
export const now = () => performance.timeOrigin + performance.now()

export const sleep = ms => new Promise(resolve => setTimeout(resolve, ms))

/** Until `condition` holds; false when it does not within `ms`. */
export const until = async (condition, ms, every = 20) => {
  const end = now() + ms
  while (!condition()) {
    if (now() >= end) return false
    await sleep(every)
  }
  return true
}

export const hash = text => createHash('sha256').update(text).digest('hex')

/** Until the test says `stop`. A test that is gone ends the script at once. */
export const stopped = () => new Promise(resolve => {
  let asked = false
  createInterface({ input: process.stdin })
    .on('line', line => {
      if (line.trim() === 'stop') {
        asked = true
        resolve()
      }
    })
    .on('close', () => asked || process.exit(1))
})

/** Numbers in [0, 1) that depend on the seed only (mulberry32). */
export const random = seed => () => {
  seed = (seed + 0x6d2b79f5) | 0
  let t = Math.imul(seed ^ (seed >>> 15), 1 | seed)
  t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t
  return ((t ^ (t >>> 14)) >>> 0) / 4294967296
}

/** FNV-1a of an update's bytes: whoever gets the same bytes gets the same number. */
const fingerprint = bytes => bytes.reduce((sum, byte) => Math.imul(sum ^ byte, 0x01000193), 0x811c9dc5 | 0) >>> 0

/** What a document holds: clocks, deleted ranges, and the content of the places that writers use. */
export const replicaOf = doc => ({
  stateVector: [...Y.decodeStateVector(Y.encodeStateVector(doc))],
  deletes: [...Y.snapshot(doc).ds.clients].flatMap(([client, ranges]) =>
    ranges.map(({ clock, len }) => [client, clock, len])),
  content: {
    text: doc.getText('quill').toString(),
    map: doc.getMap('map').toJSON(),
    array: doc.getArray('array').toJSON()
  }
})

/** One client of one document. */
export class Client {
  /** Versions are numbers of own updates: the newest, and the newest that the server returned as durable. */
  version = 0
  confirmed = 0
  offline = false
  #versions = new Map()

  /**
   * @param {{ node: string, document: string, token?: string, onEvent?: (event: object) => void }} options
   *   `node` is the http(s) address of a node; `onEvent` hears of what is sent, received and acknowledged, of status changes and closes
   */
  constructor ({ node, document, token, onEvent = () => {} }) {
    this.node = node
    this.document = document
    this.doc = new Y.Doc()
    this.text = this.doc.getText('quill')
    this.provider = new WebsocketProvider(node.replace(/^http/, 'ws') + '/ws', encodeURIComponent(document), this.doc, {
      WebSocketPolyfill: WebSocket,
      disableBc: true,
      params: token ? { token } : {}
    })
    this.provider.messageHandlers[MESSAGE_RECEIPT] = (_answer, decoder) => {
      const version = decoding.readVarUint(decoding.createDecoder(decoding.readVarUint8Array(decoder)))
      if (version > this.version) throw new Error(`receipt for version ${version} of ${this.version}`)
      if (version <= this.confirmed) return
      this.confirmed = version
      onEvent({ kind: 'ack', version })
    }
    this.provider.messageHandlers[MESSAGE_AUTH] = (_answer, decoder) => {
      decoding.readVarUint(decoder)
      onEvent({ kind: 'denied', reason: decoding.readVarString(decoder) })
    }
    const sync = this.provider.messageHandlers[MESSAGE_SYNC]
    this.provider.messageHandlers[MESSAGE_SYNC] = (answer, decoder, ...rest) => {
      const ahead = decoding.clone(decoder)
      if (decoding.readVarUint(ahead) === SYNC_UPDATE) {
        const hash = fingerprint(decoding.readVarUint8Array(ahead))
        const version = this.#versions.get(hash)
        onEvent(version ? { kind: 'echo', version } : { kind: 'recv', hash })
      }
      sync(answer, decoder, ...rest)
    }
    // The provider has heard of the update before and sent it, if it could.
    this.doc.on('update', (update, origin) => {
      if (origin === this.provider) return
      this.version += 1
      if (this.provider.wsconnected) {
        const hash = fingerprint(update)
        this.#versions.set(hash, this.version)
        onEvent({ kind: 'sent', version: this.version, hash })
      }
      this.#ask()
    })
    this.provider.on('sync', synced => {
      if (synced && this.confirmed < this.version) this.#ask()
    })
    this.provider.on('status', ({ status }) => onEvent({ kind: 'status', status }))
    this.provider.on('connection-close', event => {
      if (!this.offline) onEvent({ kind: 'close', code: event?.code ?? null })
    })
  }

  get synced () {
    return this.provider.synced
  }

  /** Whether all own edits are durable. */
  get saved () {
    return this.confirmed === this.version
  }

  /** Goes offline as a user's machine does, until `connect`. */
  disconnect () {
    this.offline = true
    this.provider.disconnect()
  }

  connect () {
    this.offline = false
    this.provider.connect()
  }

  close () {
    this.provider.destroy()
    this.doc.destroy()
  }

  #ask () {
    const { ws, synced } = this.provider
    if (!synced || ws?.readyState !== WebSocket.OPEN) return
    const payload = encoding.encode(encoder => encoding.writeVarUint(encoder, this.version))
    ws.send(encoding.encode(encoder => {
      encoding.writeVarUint(encoder, MESSAGE_RECEIPT)
      encoding.writeVarUint8Array(encoder, payload)
    }))
  }
}
