/**
 * Seeded typists: in each document several writers, each at one node, insert unique tokens into the text
 * (at seeded places between the others' tokens), a map and an array, and now and then delete one, their own or
 * another's. After each edit they ask for its receipt. They go on typing while they are offline.
 *
 * Prints, with `t` in ms since 1970: `edit` (op, token, version), `sent` (version, hash of its bytes), `recv` (hash),
 * `echo` (version), `ack` (version: covers all up to it), `status`, `close`, `offline`, `denied`, each with document and
 * writer; after `stop`, once all is acknowledged and the writers of each document agree (or `settleMs` is over), a `final`
 * per writer with what it holds.
 */
import * as Y from 'yjs'
import { Client, leave, now, options, print, random, replicaOf, sleep, stopped, until } from './client.mjs'

const { nodes, documents, writers, rate, seed, token, settleMs, spells } = options({
  nodes: ['http://127.0.0.1:8080'],
  documents: ['typist-0'],
  /** per document */
  writers: 2,
  /** edits per second and writer */
  rate: 5,
  seed: 1,
  token: null,
  settleMs: 30_000,
  /** the last writer of each document goes offline for a while before this share of its edits */
  spells: 0
})

/** Ends of tokens, so that texts hold every width of UTF-8 and lines. */
const ENDINGS = ['', '', '', 'é', '漢', '😀', '\n']
/** Longest time offline. */
const SPELL_MS = 3_000

let typing = true
const typists = documents.flatMap((document, d) =>
  Array.from({ length: writers }, (_, writer) => start(document, d, writer)))
await stopped()
typing = false
await Promise.all(typists.map(typist => typist.done))

const clients = typists.map(typist => typist.client)
const agree = () => documents.every((_, d) => {
  const [first, ...others] = clients.slice(d * writers, (d + 1) * writers).map(client => Y.snapshot(client.doc))
  return others.every(other => Y.equalSnapshots(first, other))
})
await until(() => clients.every(client => client.saved && client.synced) && agree(), settleMs, 100)
for (const { client, writer } of typists) {
  await print({
    kind: 'final',
    t: now(),
    document: client.document,
    writer,
    node: client.node,
    unsaved: client.version - client.confirmed,
    ...replicaOf(client.doc)
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
  const { doc, text } = client
  const map = doc.getMap('map')
  const array = doc.getArray('array')
  for (let n = 0; typing; n++) {
    await sleep((0.5 + dice()) * 1000 / rate)
    if (!typing) break
    if (spells > 0 && writer === writers - 1 && dice() < spells) spell(client, dice() * SPELL_MS, say)
    const place = dice()
    const deleted = dice() < 0.15 && present(place, dice())
    const token = deleted || `w${writer}n${n}${ENDINGS[Math.floor(dice() * ENDINGS.length)]};`
    const deletes = token === deleted
    // Said before it is done: an ack must never come before its edit.
    await say({ kind: 'edit', op: deletes ? 'delete' : 'insert', token, version: client.version + 1 })
    const content = text.toString()
    if (place < 0.7) {
      if (deletes) text.delete(content.indexOf(token), token.length)
      else text.insert(content.indexOf(';', Math.floor(dice() * content.length)) + 1, token)
    } else if (place < 0.85) {
      if (deletes) map.delete(token)
      else map.set(token, token)
    } else {
      if (deletes) array.delete(array.toArray().indexOf(token))
      else array.insert(Math.floor(dice() * (array.length + 1)), [token])
    }
  }
  client.connect()

  /** Some token that is in a place of the document now. */
  function present (place, choice) {
    const tokens = place < 0.7
      ? text.toString().split(';').slice(0, -1).map(start => start + ';')
      : place < 0.85 ? [...map.keys()] : array.toArray()
    return tokens[Math.floor(choice * tokens.length)]
  }
}

async function spell (client, ms, say) {
  if (client.offline) return
  await say({ kind: 'offline' })
  client.disconnect()
  await sleep(ms)
  client.connect()
}
