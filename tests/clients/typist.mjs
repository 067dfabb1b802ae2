/**
 * Seeded typists: in each document several writers, each at one node, insert unique tokens at
 * seeded places between the others' tokens and now and then delete one of their own. After each
 * edit they ask for its receipt, and they go on typing while they are offline.
 *
 * Prints, with `t` in ms since 1970: `edit` (op, token, version), `ack` (version: covers all up to
 * it), `status`, `close`, `denied`, each with document and writer; after `stop`, once all is
 * acknowledged and the writers of each document agree (or `settleMs` is over), a `final` per writer.
 */
import { Client, leave, now, options, print, random, sleep, stopped, until } from './client.mjs'

const { nodes, documents, writers, rate, seed, token, settleMs } = options({
  nodes: ['http://127.0.0.1:8080'],
  documents: ['typist-0'],
  /** per document */
  writers: 2,
  /** edits per second and writer */
  rate: 5,
  seed: 1,
  token: null,
  settleMs: 30_000
})

/** Ends of tokens, so that texts hold every width of UTF-8 and lines. */
const ENDINGS = ['', '', '', 'é', '漢', '😀', '\n']

let typing = true
const typists = documents.flatMap((document, d) =>
  Array.from({ length: writers }, (_, writer) => start(document, d, writer)))
await stopped()
typing = false
await Promise.all(typists.map(typist => typist.done))

const clients = typists.map(typist => typist.client)
const agree = () => documents.every((_, d) => {
  const texts = clients.slice(d * writers, (d + 1) * writers).map(client => client.text.toString())
  return texts.every(text => text === texts[0])
})
await until(() => clients.every(client => client.saved && client.synced) && agree(), settleMs, 50)
for (const { client, writer } of typists) {
  await print({
    kind: 'final',
    t: now(),
    document: client.document,
    writer,
    node: client.node,
    unsaved: client.version - client.confirmed,
    text: client.text.toString()
  })
}
await leave()

function start (document, d, writer) {
  const node = nodes[(d + writer) % nodes.length]
  const say = event => print({ t: now(), document, writer, node, ...event })
  const client = new Client({ node, document, token, onEvent: say })
  client.provider.awareness.setLocalStateField('user', { name: `Typist ${writer}` })
  return { client, writer, done: type(client, writer, random(seed * 1_000_003 + d * 101 + writer), say) }
}

async function type (client, writer, dice, say) {
  await until(() => client.synced || !typing, Infinity)
  const own = []
  for (let n = 0; typing; n++) {
    await sleep((0.5 + dice()) * 1000 / rate)
    if (!typing) return
    const deletes = own.length > 0 && dice() < 0.15
    const token = deletes
      ? own.splice(Math.floor(dice() * own.length), 1)[0]
      : `w${writer}n${n}${ENDINGS[Math.floor(dice() * ENDINGS.length)]};`
    // Said before it is done: an ack must never come before its edit.
    await say({ kind: 'edit', op: deletes ? 'delete' : 'insert', token, version: client.version + 1 })
    const text = client.text.toString()
    if (deletes) client.text.delete(text.indexOf(token), token.length)
    else {
      client.text.insert(text.indexOf(';', Math.floor(dice() * text.length)) + 1, token)
      own.push(token)
    }
  }
}
