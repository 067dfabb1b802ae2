/**
 * Fresh clients: connects one to each document (through the nodes in turn), waits for its first sync,
 * prints `text` (document, node, text, hash, replica) and leaves. Fails when one does not sync in time.
 */
import { Client, hash, leave, options, print, replicaOf, until } from './client.mjs'

const { nodes, documents, token, timeoutMs } = options({ nodes: ['http://127.0.0.1:8080'], documents: [], token: null, timeoutMs: 20_000 })

for (const [i, document] of documents.entries()) {
  const node = nodes[i % nodes.length]
  const client = new Client({ node, document, token })
  if (!await until(() => client.synced, timeoutMs)) {
    console.error(`${document} at ${node} did not sync in ${timeoutMs} ms`)
    process.exit(1)
  }
  const text = client.text.toString()
  await print({ kind: 'text', document, node, text, hash: hash(text), replica: replicaOf(client.doc) })
  client.close()
}
await leave()
