import assert from 'node:assert/strict'
import test from 'node:test'
import { Receipts } from '../src/receipts.js'

test('an edit is unsaved until its version comes back', () => {
  const receipts = new Receipts()
  assert.equal(receipts.unsaved, 0)
  receipts.edited()
  receipts.edited()
  assert.equal(receipts.unsaved, 2)
  receipts.confirm(1)
  assert.equal(receipts.unsaved, 1)
  receipts.confirm(2)
  assert.equal(receipts.unsaved, 0)
})

test('late, repeated and invented versions confirm nothing', () => {
  const receipts = new Receipts()
  for (let i = 0; i < 3; i++) receipts.edited()
  receipts.confirm(2)
  receipts.confirm(1)
  assert.equal(receipts.unsaved, 1)
  receipts.confirm(4)
  assert.equal(receipts.unsaved, 1)
})
