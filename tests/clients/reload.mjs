/**
 * Reads whole documents without a socket: their state as a Yjs V1 update over REST, loaded by Yjs
 * itself, and the text that the server exports. Prints `reload` (document, text, exported, replica).
 */
import * as Y from 'yjs'
import { leave, options, print, replicaOf } from './client.mjs'

const { nodes, documents, token } = options({ nodes: ['http://127.0.0.1:8080'], documents: [], token: null })

for (const [i, document] of documents.entries()) {
  const base = `${nodes[i % nodes.length]}/api/v1/documents/${encodeURIComponent(document)}`
  const get = async path => {
    const response = await fetch(base + path, { headers: token ? { authorization: `Bearer ${token}` } : {} })
    if (!response.ok) throw new Error(`${base}${path}: ${response.status} ${await response.text()}`)
    return response
  }
  const doc = new Y.Doc()
  Y.applyUpdate(doc, new Uint8Array(await (await get('/update')).arrayBuffer()))
  const replica = replicaOf(doc)
  await print({ kind: 'reload', document, text: replica.content.text, exported: await (await get('/text')).text(), replica })
}
await leave()
