/**
 * Stock clients of every family, side by side: takes commands as JSON lines on stdin, `{ id, do, … }`, and
 * answers each with `{ id, value }` or `{ id, error }`, in whatever order they end.
 *
 * What a client knows of itself is told in the words of its own family: whether it is in sync, and
 * whether all it did is saved.
 */
import 'fake-indexeddb/auto'
import { HocuspocusProvider, HocuspocusProviderWebsocket } from '@hocuspocus/provider'
import { createYjsProvider } from '@y-sweet/client'
import { DocumentManager } from '@y-sweet/sdk'
import { WebsocketProvider as WebsocketProvider4 } from '@y/websocket'
import * as Y14 from '@y/y'
import { HocuspocusProvider as HocuspocusProvider3, HocuspocusProviderWebsocket as HocuspocusProviderWebsocket3 } from 'hocuspocus-provider-3'
import * as decoding from 'lib0/decoding'
import WebSocket from 'ws'
import { IndexeddbPersistence } from 'y-indexeddb'
import { WebsocketProvider } from 'y-websocket'
import * as Y from 'yjs'
import { sleep } from './client.mjs'
import { serve } from './commands.mjs'

console.log = console.warn = console.error

/** Client and socket, by the names that the test gave them. */
const clients = new Map()
const sockets = new Map()

/** y-websocket shows no sign of its own: its edits are saved when they come back. */
function websocket (Provider, { node, document, token, presence, client }) {
  const provider = new Provider(`${node.replace(/^http/, 'ws')}/ws`, document, client.doc, {
    WebSocketPolyfill: WebSocket, disableBc: true, params: token ? { token } : {}
  })
  if (!presence) provider.awareness.setLocalState(null)
  const unsaved = new Set()
  client.doc.on('update', (update, origin) => {
    if (origin === provider) return
    unsaved.add(Buffer.from(update).toString('hex'))
    client.changed()
  })
  const sync = provider.messageHandlers[0]
  provider.messageHandlers[0] = (encoder, decoder, ...rest) => {
    const ahead = decoding.createDecoder(decoder.arr.subarray(decoder.pos))
    if (decoding.readVarUint(ahead) === 2) {
      unsaved.delete(Buffer.from(decoding.readVarUint8Array(ahead)).toString('hex'))
    }
    sync(encoder, decoder, ...rest)
    client.changed()
  }
  provider.messageHandlers[2] = (_encoder, decoder) => {
    decoding.readVarUint(decoder)
    client.denied.push(decoding.readVarString(decoder))
  }
  provider.on('connection-close', event => client.closes.push(event?.code ?? null))
  return {
    provider,
    awareness: provider.awareness,
    isSynced: () => provider.synced,
    isSaved: () => unsaved.size === 0,
    cut: () => provider.ws?.terminate(),
    close: () => provider.destroy()
  }
}

function hocuspocus (Provider, Socket, { node, document, token, nextToken, presence, socket, sessions, client }) {
  const key = `${client.family} ${socket ?? client.name}`
  if (!sockets.has(key)) {
    const url = `${node.replace(/^http/, 'ws')}/hocuspocus`
    const shared = new Socket({ url, WebSocketPolyfill: WebSocket, delay: 200, minDelay: 200 })
    shared.closes = []
    shared.on('close', ({ event }) => shared.closes.push(event.code))
    sockets.set(key, shared)
  }
  const websocketProvider = sockets.get(key)
  client.closes = websocketProvider.closes
  client.token = token ?? ''
  const provider = new Provider({
    websocketProvider,
    name: document,
    document: client.doc,
    token () {
      const given = client.token
      if (nextToken) client.token = nextToken
      return given
    },
    ...(sessions && { sessionAwareness: true }),
    ...(!presence && { awareness: null })
  })
  provider.on('unsyncedChanges', () => client.changed())
  provider.on('authenticationFailed', ({ reason }) => client.denied.push(reason))
  provider.on('authenticated', ({ scope }) => client.scopes.push(scope))
  provider.on('stateless', ({ payload }) => client.stateless.push(payload))
  provider.on('close', ({ event }) => client.left.push(event.reason))
  provider.attach()
  return {
    provider,
    awareness: provider.awareness,
    isSynced: () => provider.synced,
    isSaved: () => !provider.hasUnsyncedChanges,
    cut: () => websocketProvider.webSocket?.terminate(),
    close () {
      provider.destroy()
      // Others may still be on the socket.
      if (!socket) {
        websocketProvider.destroy()
        sockets.delete(key)
      }
    }
  }
}

function ySweet ({ node, document, token, presence, client }) {
  // The token is the one of the application's server, which asks for the client's own.
  const [, user, authorization] = (token ?? '||').split('|')
  const manager = new DocumentManager(connectionString(node, token))
  const fetchToken = async () => {
    try {
      return await manager.getOrCreateDocAndToken(document, { userId: user, authorization: authorization || 'full' })
    } catch (error) {
      client.denied.push(String(error))
      throw error
    }
  }
  const provider = createYjsProvider(client.doc, document, fetchToken, { WebSocketPolyfill: WebSocket, showDebuggerLink: false })
  if (!presence) provider.awareness.setLocalState(null)
  provider.on('local-changes', () => client.changed())
  provider.on('connection-close', event => client.closes.push(event.code))
  return {
    provider,
    awareness: provider.awareness,
    isSynced: () => provider.status === 'connected',
    isSaved: () => !provider.hasLocalChanges,
    cut: () => provider.websocket?.terminate(),
    close () {
      // It would come back otherwise, whatever it is told.
      provider.connect = async () => {}
      provider.status = 'offline'
      provider.destroy()
    }
  }
}

const connectionString = (node, token) => node.replace(/^http:\/\//, token ? `ys://${encodeURIComponent(token.split('|')[0])}@` : 'ys://')

const families = {
  'y-websocket-3': options => websocket(WebsocketProvider, options),
  'y-websocket-4': options => websocket(WebsocketProvider4, options),
  'hocuspocus-3': options => hocuspocus(HocuspocusProvider3, HocuspocusProviderWebsocket3, options),
  'hocuspocus-4': options => hocuspocus(HocuspocusProvider, HocuspocusProviderWebsocket, options),
  'y-sweet': ySweet
}

const commands = {
  /** `stored`: a name in the browser's own store, which is read before the client connects. */
  async open ({ name, family, node, document, token, next_token: nextToken, presence = true, socket, sessions, stored }) {
    const doc = family === 'y-websocket-4' ? new Y14.Doc() : new Y.Doc()
    const client = {
      name,
      family,
      doc,
      text: doc.getText ? doc.getText('quill') : doc.get('quill'),
      denied: [],
      closes: [],
      scopes: [],
      stateless: [],
      left: [],
      /** How often its sign turned to saved. */
      turns: 0,
      wasSaved: false,
      changed () {
        const saved = this.isSaved?.() ?? false
        if (saved && !this.wasSaved) this.turns += 1
        this.wasSaved = saved
      }
    }
    if (stored) {
      client.store = new IndexeddbPersistence(stored, doc)
      await client.store.whenSynced
    }
    clients.set(name, client)
    Object.assign(client, families[family]({ node, document, token, nextToken, presence, socket, sessions, client }))
    if (presence) client.awareness?.setLocalStateField('user', { name })
  },
  edit ({ client, text }) {
    client.text.insert(client.text.toString().length, text)
  },
  remove ({ client, length }) {
    client.text.delete(0, length)
  },
  /** Only the socket goes; the client comes back by itself. */
  cut ({ client }) {
    client.cut()
  },
  stateless ({ client, payload }) {
    client.provider.sendStateless(payload)
  },
  /** Another token on the same socket. */
  async renew ({ client, token }) {
    client.token = token
    await client.provider.sendToken()
  },
  force ({ client }) {
    client.provider.forceSync()
  },
  look ({ client }) {
    client.changed()
    return {
      text: client.text.toString(),
      synced: client.isSynced(),
      saved: client.isSaved(),
      turns: client.turns,
      denied: client.denied,
      closes: client.closes,
      scopes: client.scopes,
      stateless: client.stateless,
      left: client.left,
      people: [...client.awareness?.getStates().values() ?? []].flatMap(state => state.user?.name ?? []).sort(),
      sockets: new Set([...clients.values()].map(({ provider }) => provider?.configuration?.websocketProvider).filter(Boolean)).size
    }
  },
  async close ({ client, name }) {
    client.close()
    await client.store?.destroy()
    clients.delete(name)
    await sleep(20)
  },
  /** The SDK of an application's server. */
  async sdk ({ node, token, call, document, update, options }) {
    const manager = new DocumentManager(connectionString(node, token))
    if (call === 'checkStore') return manager.checkStore()
    if (call === 'createDoc') return manager.createDoc(document ?? undefined)
    if (call === 'getClientToken') return manager.getClientToken(document, options)
    if (call === 'updateDoc') {
      const doc = new Y.Doc()
      doc.getText('quill').insert(0, update)
      return manager.updateDoc(document, Y.encodeStateAsUpdate(doc))
    }
    if (call === 'createDocWithContent') {
      const doc = new Y.Doc()
      doc.getText('quill').insert(0, update)
      return manager.createDocWithContent(Y.encodeStateAsUpdate(doc))
    }
    const doc = new Y.Doc()
    Y.applyUpdate(doc, await manager.getDocAsUpdate(document))
    return doc.getText('quill').toString()
  }
}

const given = ({ name }, command) => {
  const client = clients.get(name)
  if (!client && command !== 'open' && command !== 'sdk') throw new Error(`no client ${name}`)
  return { client }
}

// What a provider does beside its promises must not end the others.
process.on('unhandledRejection', error => console.error('unhandled', error))
process.on('uncaughtException', error => console.error('uncaught', error))
await serve(commands, given)
