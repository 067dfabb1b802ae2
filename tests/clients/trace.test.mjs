import assert from 'node:assert/strict'
import test from 'node:test'
import * as Y from 'yjs'
import { applyPatch, plan } from './trace.mjs'

const txn = (agent, parents, ...patches) => ({ agent, parents, patches })

test('a step ends where another agent looks, and says what it needs', () => {
  const { steps } = plan({
    numAgents: 2,
    txns: [
      txn(0, [], [0, 0, 'a']),
      txn(0, [0], [1, 0, 'b']), // seen by the other
      txn(0, [1], [2, 0, 'c']), // not seen
      txn(1, [1], [0, 0, 'x']),
      txn(1, [3], [0, 0, 'y']),
      txn(0, [2, 4], [0, 0, 'd'])
    ]
  }, 100)
  assert.deepEqual(steps, [
    [
      { needs: [0, 0], patches: [[0, 0, 'a'], [1, 0, 'b']] },
      { needs: [1, 0], patches: [[2, 0, 'c']] },
      { needs: [2, 1], patches: [[0, 0, 'd']] }
    ],
    [{ needs: [1, 0], patches: [[0, 0, 'x'], [0, 0, 'y']] }]
  ])
})

test('a step has no more patches than asked for', () => {
  const txns = Array.from({ length: 5 }, (_, i) => txn(0, i ? [i - 1] : [], [i, 0, 'a']))
  assert.deepEqual(plan({ numAgents: 1, txns }, 2).steps[0].map(step => step.patches.length), [2, 2, 1])
})

test('an agent that forgets its own past is refused', () => {
  assert.throws(() => plan({ numAgents: 1, txns: [txn(0, [], [0, 0, 'a']), txn(0, [], [0, 0, 'b'])] }, 10), /previous/)
})

test('positions are code points', () => {
  const text = new Y.Doc().getText()
  text.insert(0, '👩‍💻😀b')
  applyPatch(text, [3, 1, 'ü'], true)
  assert.equal(text.toString(), '👩‍💻üb')
})
