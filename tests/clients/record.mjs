/**
 * Records a session of two seeded typists who see each other's edits late, as a concurrent trace, and
 * prints it. The fixture is `node record.mjs '{"seed":7,"transactions":1500}' > ../fixtures/two-writers.json`.
 */
import * as Y from 'yjs'
import { leave, options, print, random } from './client.mjs'
import { applyPatch, clientIdOf } from './trace.mjs'

const { seed, transactions } = options({ seed: 7, transactions: 1500 })
const dice = random(seed)
const below = n => Math.floor(dice() * n)
const WORDS = ['edit', 'saved ', 'means', ' saved', 'node', 'Größe', 'naïve ', '漢字', '👩‍💻', '😀', ', ', '.\n', ' ', 'a', 'b', 'c']

const agents = [0, 1].map(agent => {
  const doc = new Y.Doc()
  doc.clientID = clientIdOf(agent)
  return { doc, text: doc.getText('quill'), heads: [], cursor: 0 }
})
const txns = []
const ancestors = []

while (txns.length < transactions) {
  const agent = below(2)
  const self = agents[agent]
  if (dice() < 0.2) receive(self, agents[1 - agent])
  const points = [...self.text.toString()]
  if (dice() < 0.1 || self.cursor > points.length) self.cursor = below(points.length + 1)
  const deleted = dice() < 0.2 ? Math.min(self.cursor, 1 + below(4)) : 0
  const inserted = deleted ? '' : WORDS[below(WORDS.length)]
  self.cursor -= deleted
  const patch = [self.cursor, deleted, inserted]
  self.doc.transact(() => applyPatch(self.text, patch, true))
  self.cursor += [...inserted].length
  ancestors.push(new Set(self.heads.flatMap(head => [head, ...ancestors[head]])))
  txns.push({ agent, parents: self.heads, patches: [patch] })
  self.heads = [txns.length - 1]
}
receive(agents[0], agents[1])
receive(agents[1], agents[0])
const endContent = agents[0].text.toString()
if (endContent !== agents[1].text.toString()) throw new Error('the writers do not agree')
await print({ kind: 'concurrent', numAgents: 2, endContent, txns })
await leave()

function receive (self, other) {
  Y.applyUpdate(self.doc, Y.encodeStateAsUpdate(other.doc, Y.encodeStateVector(self.doc)))
  const heads = [...new Set([...self.heads, ...other.heads])]
  self.heads = heads.filter(head => !heads.some(later => ancestors[later].has(head))).sort((a, b) => a - b)
}
