/**
 * One open document: the Yjs document, its connection, who else is here, and whether all is saved.
 * Nothing here touches the page; it says what changed by events:
 *
 * - `state` (state, unsaved): `saved`, `unsaved` or `offline`, and the number of unsaved edits
 * - `people` (list): everybody in the document, ourselves first
 * - `ready`: the first exchange with the server is over
 * - `unreachable`: a connection could not be made, perhaps for want of a token
 * - `denied` (reason): the server refuses the document and will not change its mind by itself
 */
import { ObservableV2 } from 'lib0/observable'
import * as decoding from 'lib0/decoding'
import * as encoding from 'lib0/encoding'
import { WebsocketProvider } from 'y-websocket'
import * as Y from 'yjs'
import { Receipts } from './receipts.js'

/** Name of the shared text, by which the server exports it, too. */
export const TEXT_NAME = 'quill'

const MESSAGE_AUTH = 2
/** Asks for a receipt: the server returns the payload once all it got before is durable. */
const MESSAGE_RECEIPT = 102

export class Session extends ObservableV2 {
  /**
   * @param {{ url: string, name: string, token: string | null, user: { name: string, color: string } }} options
   *   where the server takes WebSockets, and the document's name
   */
  constructor ({ url, name, token, user }) {
    super()
    this.name = name
    this.doc = new Y.Doc()
    this.text = this.doc.getText(TEXT_NAME)
    this.receipts = new Receipts()
    this.ready = false
    this.provider = new WebsocketProvider(url, encodeURIComponent(name), this.doc, {
      connect: false,
      // Edits must not reach another tab past the server, where no receipt would cover them.
      disableBc: true,
      params: parameters(token)
    })
    this.awareness = this.provider.awareness
    this.introduce(user)

    this.provider.messageHandlers[MESSAGE_RECEIPT] = (_answer, decoder) => {
      const payload = decoding.createDecoder(decoding.readVarUint8Array(decoder))
      this.receipts.confirm(decoding.readVarUint(payload))
      this.#publish()
    }
    this.provider.messageHandlers[MESSAGE_AUTH] = (_answer, decoder) => {
      decoding.readVarUint(decoder) // 0, permission denied, is the only kind
      this.emit('denied', [decoding.readVarString(decoder)])
    }
    // Registered after the provider's own listener, so the request follows its edit on the wire.
    this.doc.on('update', (_update, origin) => {
      if (origin === this.provider) return
      this.receipts.edited()
      this.#ask()
      this.#publish()
    })
    this.provider.on('sync', synced => {
      if (synced) {
        if (this.receipts.unsaved) this.#ask()
        // Raises our clock: with the old one, who has known us before would not see us come back.
        this.awareness.setLocalState(this.awareness.getLocalState())
        if (!this.ready) {
          this.ready = true
          this.emit('ready', [])
        }
      }
      this.#publish()
    })
    this.provider.on('connection-close', event => {
      if (event && !this.provider.wsconnected) this.emit('unreachable', [])
    })
    this.provider.on('closed', ({ code, reason }) => {
      if (code === 4401) this.emit('unreachable', [])
      else this.emit('denied', [reason || `closed with code ${code}`])
    })
    let known = ''
    this.awareness.on('change', () => {
      // Most changes are moving cursors, which the editor shows.
      const people = this.people
      if (known === (known = JSON.stringify(people))) return
      this.emit('people', [people])
    })
  }

  /** Starts to connect; the provider reconnects by itself from then on. */
  open () {
    this.#publish()
    this.emit('people', [this.people])
    this.provider.connect()
  }

  /** Stops trying to connect, until another token is given. */
  pause () {
    this.provider.disconnect()
  }

  /** Leaves the document for good: edits that were not saved are given up. */
  close () {
    this.provider.destroy()
    this.receipts.confirm(this.receipts.version)
  }

  /** `saved`, `unsaved` or `offline`. */
  get state () {
    if (!this.provider.synced) return 'offline'
    return this.receipts.unsaved ? 'unsaved' : 'saved'
  }

  /** Everybody in the document, ourselves first. */
  get people () {
    return [...this.awareness.getStates()]
      .filter(([, state]) => state.user)
      .map(([id, { user }]) => ({ id, name: user.name, color: user.color, self: id === this.doc.clientID }))
      .sort((a, b) => Number(b.self) - Number(a.self) || a.id - b.id)
  }

  /**
   * Tells the others who we are.
   * @param {{ name: string, color: string }} user
   */
  introduce (user) {
    this.awareness.setLocalStateField('user', user)
  }

  /**
   * Connects again with another token.
   * @param {string | null} token
   */
  authorize (token) {
    this.provider.params = parameters(token)
    this.provider.connect()
  }

  #ask () {
    const { ws, synced } = this.provider
    if (!synced || ws?.readyState !== ws?.OPEN) return
    const payload = encoding.encode(encoder => encoding.writeVarUint(encoder, this.receipts.version))
    ws.send(encoding.encode(encoder => {
      encoding.writeVarUint(encoder, MESSAGE_RECEIPT)
      encoding.writeVarUint8Array(encoder, payload)
    }))
  }

  #publish () {
    this.emit('state', [this.state, this.receipts.unsaved])
  }
}

const parameters = token => token ? { token } : {}
