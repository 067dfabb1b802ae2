/**
 * The sign beside each editor: `offline`, `unsaved` or `saved`. Saved is what the cluster has committed,
 * and each family of clients has its own way to learn that.
 */
import * as decoding from 'lib0/decoding'
import * as encoding from 'lib0/encoding'

const output = document.getElementById('state')

const show = (online, saved) => {
  output.value = !online ? 'offline' : saved ? 'saved' : 'unsaved'
}

/**
 * y-websocket has no sign of its own, but takes handlers for other messages: 102 comes back with what was put
 * into it, once everything that was sent before is committed.
 */
export function ofWebsocket (provider) {
  const SAVED = 102
  let version = 0
  let saved = 0
  const update = () => show(provider.synced, saved === version)
  const ask = () => {
    if (!provider.synced) return
    provider.ws.send(encoding.encode(message => {
      encoding.writeVarUint(message, SAVED)
      encoding.writeVarUint8Array(message, encoding.encode(payload => encoding.writeVarUint(payload, version)))
    }))
  }
  provider.messageHandlers[SAVED] = (_answer, message) => {
    saved = decoding.readVarUint(decoding.createDecoder(decoding.readVarUint8Array(message)))
    update()
  }
  provider.doc.on('update', (_update, origin) => {
    if (origin === provider) return
    version += 1
    ask()
    update()
  })
  provider.on('sync', () => {
    ask()
    update()
  })
  provider.on('status', update)
}

/** Hocuspocus: the provider counts what the cluster has not acknowledged. */
export function ofHocuspocus (provider) {
  const update = () => show(provider.isSynced, !provider.hasUnsyncedChanges)
  for (const event of ['synced', 'unsyncedChanges', 'status', 'disconnect']) provider.on(event, update)
}

/** y-sweet: the client asks, and compares what it gets back with what it has. */
export function ofYSweet (provider) {
  const update = () => show(provider.status === 'connected', !provider.hasLocalChanges)
  for (const event of ['local-changes', 'connection-status']) provider.on(event, update)
}

/** The document that the address asks for, and the cluster. */
export const documentName = new URL(location.href).searchParams.get('document') ?? 'notes'
const { content: node } = document.querySelector('meta[name=node]')
export const socketAddress = node.replace(/^http/, 'ws')
