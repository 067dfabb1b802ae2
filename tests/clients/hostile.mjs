/**
 * A client that does what no client should. Prints `said` once, an object that depends on the mode:
 * - `gap`: sends an update without the one before it, and tells whether and when all was saved after all
 * - `flood`: sends 20,000 updates whose predecessors nobody has
 * - `replay`: sends one update a hundred times, and tells the text of a fresh client
 * - `panic`: sends an update that makes a debug build panic which was asked to
 * - `bulk`: writes 64 MiB, and tells how long that took
 * - `many`: opens documents of 1 MiB each until one is refused, a hundred at most
 */
import { once } from 'node:events'
import * as encoding from 'lib0/encoding'
import WebSocket from 'ws'
import * as Y from 'yjs'
import { Client, leave, now, options, print, sleep, until } from './client.mjs'

const { mode, node, document } = options({ mode: 'gap', node: 'http://127.0.0.1:8080', document: 'hostile' })

const SOON = 20_000
const frameOf = update => encoding.encode(encoder => {
  encoding.writeVarUint(encoder, 0)
  encoding.writeVarUint(encoder, 2)
  encoding.writeVarUint8Array(encoder, update)
})
const synced = async client => {
  if (!await until(() => client.synced, SOON)) throw new Error('it does not sync')
  return client
}
const open = (name = document, onEvent) => synced(new Client({ node, document: name, onEvent }))

const modes = {
  async gap () {
    const client = await open()
    const { ws } = client.provider
    const send = ws.send.bind(ws)
    ws.send = () => {}
    client.text.insert(0, 'first;')
    ws.send = send
    const begun = now()
    client.text.insert(6, 'second;')
    const saved = await until(() => client.saved, SOON)
    return { saved, ms: Math.round(now() - begun) }
  },
  async flood () {
    // A socket of its own, which answers nothing: a provider would send its whole state each time it is asked.
    const ws = new WebSocket(node.replace(/^http/, 'ws') + '/ws/' + encodeURIComponent(document))
    const closes = []
    ws.on('close', code => closes.push(code))
    await once(ws, 'open')
    const begun = now()
    let sent = 0
    for (; sent < 20_000 && closes.length === 0; sent++) {
      // One letter of a client of its own, after one that nobody has.
      ws.send(frameOf(encoding.encode(encoder => {
        for (const number of [1, 1, 1_000 + sent, 1]) encoding.writeVarUint(encoder, number)
        encoding.writeUint8(encoder, 0x84)
        for (const number of [1_000 + sent, 0]) encoding.writeVarUint(encoder, number)
        encoding.writeVarString(encoder, 'b')
        encoding.writeVarUint(encoder, 0)
      })))
      if (sent % 100 === 0) await sleep(1)
    }
    await until(() => ws.bufferedAmount === 0 || closes.length > 0, SOON)
    const ms = Math.round(now() - begun)
    ws.close()
    return { sent, ms, closes }
  },
  async replay () {
    const client = await open()
    client.doc.once('update', update => {
      for (let n = 0; n < 99; n++) client.provider.ws.send(frameOf(update))
    })
    client.text.insert(0, 'once;')
    if (!await until(() => client.saved, SOON)) throw new Error('it was not saved')
    const fresh = await open()
    return { text: fresh.text.toString() }
  },
  async panic () {
    const closes = []
    const client = await open(document, event => event.kind === 'close' && closes.push(event.code))
    // In an update that nobody keeps: this client's own copy goes with it.
    const doc = new Y.Doc()
    doc.getText('collab-drill-panic').insert(0, 'x')
    client.provider.ws.send(frameOf(Y.encodeStateAsUpdate(doc)))
    await until(() => closes.length > 0, 2_000)
    client.close()
    return { closes }
  },
  async bulk () {
    const client = await open()
    const begun = now()
    const map = client.doc.getMap('bulk')
    for (let n = 0; n < 512; n++) {
      map.set(`${n}`, 'x'.repeat(128 * 1024))
      if (n % 8 === 7 && !await until(() => client.saved, SOON)) return { written: n, saved: false }
    }
    return { ms: Math.round(now() - begun), saved: await until(() => client.saved, SOON) }
  },
  async many () {
    let opened = 0
    for (; opened < 100; opened++) {
      const client = new Client({ node, document: `${document}-${opened}` })
      if (!await until(() => client.synced, 5_000)) break
      client.text.insert(0, 'x'.repeat(1024 * 1024))
      if (!await until(() => client.saved, 5_000)) break
    }
    return { opened }
  }
}

await print({ said: await modes[mode]() })
await leave()
