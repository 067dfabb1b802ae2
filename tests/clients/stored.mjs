/**
 * Loads documents as they are stored, from a file of JSON: updates, as arrays of bytes, by document. Prints `stored`
 * (document, replica) for each.
 */
import { readFile } from 'node:fs/promises'
import * as Y from 'yjs'
import { leave, options, print, replicaOf } from './client.mjs'

const { path } = options({ path: '/dev/stdin' })

for (const [document, updates] of Object.entries(JSON.parse(await readFile(path)))) {
  const doc = new Y.Doc()
  for (const update of updates) Y.applyUpdate(doc, Uint8Array.from(update))
  await print({ kind: 'stored', document, replica: replicaOf(doc) })
}
await leave()
