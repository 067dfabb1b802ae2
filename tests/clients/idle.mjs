/**
 * Idle clients, spread over nodes and documents, that reconnect as stock clients do. Prints
 * `connected` (count) whenever the number changes, at most ten times a second, until `stop`.
 */
import { Client, leave, options, print, sleep, stopped } from './client.mjs'

const { nodes, documents, count, token } = options({ nodes: ['http://127.0.0.1:8080'], documents: ['idle'], count: 10, token: null })

let running = true
const clients = Array.from({ length: count }, (_, i) =>
  new Client({ node: nodes[i % nodes.length], document: documents[i % documents.length], token }))
stopped().then(() => { running = false })
for (let known = -1; running; await sleep(100)) {
  const connected = clients.filter(client => client.synced).length
  if (connected !== known) await print({ kind: 'connected', count: known = connected })
}
for (const client of clients) client.close()
await sleep(100)
await leave()
