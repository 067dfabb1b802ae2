// Writes client-frames.json: what each family's stock client sends to a server, frame by frame, and frames
// of a server made with the family's own encoders. After `npm ci` in tests/clients:
//
//     node node/core/testdata/client-frames.mjs > node/core/testdata/client-frames.json
import { once } from 'node:events'

const here = name => import(new URL(`../../../tests/clients/node_modules/${name}`, import.meta.url))

const { WebSocket, WebSocketServer } = await here('ws/wrapper.mjs')
const Y = await here('yjs/dist/yjs.mjs')
const Y14 = await here('@y/y/src/index.js')
const decoding = await here('lib0/decoding.js')
const encoding = await here('lib0/encoding.js')
const awareness = await here('y-protocols/awareness.js')
const sync = await here('y-protocols/sync.js')
const hocuspocus = await here('@hocuspocus/common/dist/hocuspocus-common.esm.js')
const { WebsocketProvider } = await here('y-websocket/src/y-websocket.js')
const { WebsocketProvider: WebsocketProvider4 } = await here('@y/websocket/src/y-websocket.js')
const { createYjsProvider } = await here('@y-sweet/client/dist/main.mjs')
const hocuspocus4 = await here('@hocuspocus/provider/dist/hocuspocus-provider.esm.js')
const hocuspocus3 = await here('hocuspocus-provider-3/dist/hocuspocus-provider.esm.js')

console.log = console.info = console.warn = console.error
const EMPTY = new Uint8Array([0, 0])
const NOTHING = new Uint8Array([0])
const frame = write => encoding.encode(write)
const hex = bytes => Buffer.from(bytes).toString('hex')
const sleep = ms => new Promise(resolve => setTimeout(resolve, ms))

/** The first integers of a message, after its address if it has one, in words. */
const what = (bytes, addressed) => {
  if (addressed && bytes.length === 1) return { 9: 'ping', 10: 'pong' }[bytes[0]]
  const decoder = decoding.createDecoder(bytes)
  if (addressed) decoding.readVarString(decoder)
  const type = decoding.readVarUint(decoder)
  if (type === 0) return ['step1', 'step2', 'update'][decoding.readVarUint(decoder)]
  return { 1: 'awareness', 2: 'token', 3: 'query', 5: 'stateless', 7: 'close', 102: 'saved' }[type]
}

/** What a client sends that connects, syncs, edits and leaves. `answers` is what a server says to a message. */
const record = async ({ connect, doc, answers, act = () => {}, addressed = false }) => {
  const frames = []
  const server = new WebSocketServer({ port: 0, host: '127.0.0.1' })
  // The first only: y-sweet's client comes back after it was destroyed.
  server.once('connection', socket => {
    socket.on('message', data => {
      const bytes = new Uint8Array(data)
      const said = what(bytes, addressed)
      frames.push([said, hex(bytes)])
      for (const answer of answers(said, bytes)) socket.send(answer)
    })
  })
  await once(server, 'listening')
  doc.clientID = 300
  const provider = connect(`ws://127.0.0.1:${server.address().port}`, doc)
  const seen = async said => {
    for (let tries = 0; !frames.some(([other]) => other === said); tries += 1) {
      if (tries === 200) throw new Error(`no ${said}`)
      await sleep(10)
    }
  }
  await seen('step2')
  const text = doc.getText ? doc.getText('quill') : doc.get('quill')
  text.insert(0, 'a')
  await seen('update')
  await act(provider, seen)
  await sleep(50)
  provider.destroy()
  await sleep(100)
  for (const socket of server.clients) socket.terminate()
  server.close()
  return frames
}

const plain = said => said === 'step1'
  ? [
      frame(e => { encoding.writeVarUint(e, 0); encoding.writeVarUint(e, 0); encoding.writeVarUint8Array(e, NOTHING) }),
      frame(e => { encoding.writeVarUint(e, 0); encoding.writeVarUint(e, 1); encoding.writeVarUint8Array(e, EMPTY) })
    ]
  : []

/** @param {string} address as in each frame */
const addressed = (address, version) => said => {
  const message = write => frame(e => { encoding.writeVarString(e, address); write(e) })
  if (said === 'token') {
    return [message(e => { encoding.writeVarUint(e, 2); hocuspocus.writeAuthenticated(e, 'read-write') })]
  }
  if (said !== 'step1') return []
  return [
    message(e => { encoding.writeVarUint(e, 0); sync.writeSyncStep1(e, new Y.Doc()) }),
    message(e => { encoding.writeVarUint(e, 0); sync.writeSyncStep2(e, new Y.Doc()) }),
    message(e => { encoding.writeVarUint(e, 8); encoding.writeVarInt(e, 1) }),
    ...(version === 4 ? [new Uint8Array([9])] : [])
  ]
}

const provide = ({ HocuspocusProvider, HocuspocusProviderWebsocket }, sessionAwareness) => (url, document) => {
  const websocketProvider = new HocuspocusProviderWebsocket({ url, WebSocketPolyfill: WebSocket })
  const provider = new HocuspocusProvider({
    websocketProvider, name: 'notes/1', document, token: 'token of the app', ...(sessionAwareness && { sessionAwareness })
  })
  provider.sessionId = 'session'
  provider.attach()
  return {
    sendStateless: text => provider.sendStateless(text),
    async destroy () {
      provider.destroy()
      await sleep(50)
      websocketProvider.destroy()
    }
  }
}
const signal = version => async (provider, seen) => {
  provider.sendStateless('from the app')
  await seen('stateless')
  if (version === 4) await seen('pong')
}

const clients = {
  'y-websocket-3': await record({
    doc: new Y.Doc(),
    answers: plain,
    connect: (url, doc) => new WebsocketProvider(url, 'notes', doc, { WebSocketPolyfill: WebSocket, disableBc: true })
  }),
  'y-websocket-4': await record({
    doc: new Y14.Doc(),
    answers: plain,
    connect: (url, doc) => new WebsocketProvider4(url, 'notes', doc, { WebSocketPolyfill: WebSocket, disableBc: true })
  }),
  'hocuspocus-3': await record({
    doc: new Y.Doc(), addressed: true, answers: addressed('notes/1', 3), connect: provide(hocuspocus3), act: signal(3)
  }),
  'hocuspocus-4': await record({
    doc: new Y.Doc(), addressed: true, answers: addressed('notes/1', 4), connect: provide(hocuspocus4), act: signal(4)
  }),
  'hocuspocus-4-sessions': await record({
    doc: new Y.Doc(),
    addressed: true,
    answers: addressed('notes/1\0session', 4),
    connect: provide(hocuspocus4, true),
    act: signal(4)
  }),
  'y-sweet': await record({
    doc: new Y.Doc(),
    answers: (said, bytes) => said === 'saved' ? [bytes] : plain(said),
    connect: (url, doc) => createYjsProvider(doc, 'notes', async () => ({ url, baseUrl: url, docId: 'notes', authorization: 'full' }), {
      WebSocketPolyfill: WebSocket, showDebuggerLink: false
    })
  })
}

const about = write => hex(frame(e => { encoding.writeVarString(e, 'notes/1'); write(e) }))
const auth = write => about(e => { encoding.writeVarUint(e, 2); write(e) })
const answers = {
  hocuspocus: {
    'token request': auth(e => hocuspocus.writeTokenSyncRequest(e)),
    denied: auth(e => hocuspocus.writePermissionDenied(e, 'no')),
    readonly: auth(e => hocuspocus.writeAuthenticated(e, 'readonly')),
    'read-write': auth(e => hocuspocus.writeAuthenticated(e, 'read-write')),
    step1: about(e => { encoding.writeVarUint(e, 0); sync.writeSyncStep1(e, new Y.Doc()) }),
    step2: about(e => { encoding.writeVarUint(e, 0); sync.writeSyncStep2(e, new Y.Doc()) }),
    update: about(e => { encoding.writeVarUint(e, 0); sync.writeUpdate(e, new Uint8Array([1, 2, 3])) }),
    awareness: about(e => {
      encoding.writeVarUint(e, 1)
      encoding.writeVarUint8Array(e, awareness.encodeAwarenessUpdate(new awareness.Awareness(new Y.Doc()), []))
    }),
    stateless: about(e => { encoding.writeVarUint(e, 5); encoding.writeVarString(e, 'from the app') }),
    close: about(e => { encoding.writeVarUint(e, 7); encoding.writeVarString(e, 'bye') }),
    saved: about(e => { encoding.writeVarUint(e, 8); encoding.writeVarInt(e, 1) }),
    refused: about(e => { encoding.writeVarUint(e, 8); encoding.writeVarInt(e, 0) })
  },
  'y-sweet': { saved: clients['y-sweet'].findLast(([said]) => said === 'saved')[1] }
}

const pairs = Object.entries(clients).map(([family, frames]) =>
  `    ${JSON.stringify(family)}: [\n${frames.map(pair => `      ${JSON.stringify(pair)}`).join(',\n')}\n    ]`)
process.stdout.write(`{\n  "clients": {\n${pairs.join(',\n')}\n  },\n  "answers": ${JSON.stringify(answers, null, 2).replaceAll('\n', '\n  ')}\n}\n`)
process.exit(0)
