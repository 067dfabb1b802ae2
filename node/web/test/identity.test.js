import assert from 'node:assert/strict'
import test from 'node:test'
import { COLORS, distinctColor, loadToken, loadUser } from '../src/identity.js'

const storage = (values = {}) => ({ values, getItem: key => values[key] ?? null, setItem: (key, value) => { values[key] = value } })
const person = (id, color, self = false) => ({ id, color, self })

test('white initials can be read on every colour', () => {
  for (const color of COLORS) assert.ok(contrastToWhite(color) >= 4.5, `${color}: ${contrastToWhite(color)}`)
})

test('of two people with one colour, the later one gives way', () => {
  const [first, second] = COLORS
  assert.equal(distinctColor([person(1, first, true), person(2, first)]), first)
  assert.equal(distinctColor([person(2, first, true), person(1, first)]), second)
  assert.equal(distinctColor([person(3, first, true), person(1, first), person(2, second)]), COLORS[2])
  const crowd = COLORS.map((color, id) => person(id, color))
  assert.equal(distinctColor([person(99, first, true), ...crowd]), first)
})

test('a user is made up once and then remembered', () => {
  const local = storage()
  const user = loadUser(local)
  assert.match(user.name, /^\w+ \w+$/)
  assert.ok(COLORS.includes(user.color))
  assert.deepEqual(loadUser(local), user)
})

test('a token leaves the address and stays with the tab', () => {
  const session = storage()
  const replaced = []
  const history = { replaceState: (...args) => replaced.push(args[2]) }
  assert.equal(loadToken(session, { hash: '', pathname: '/', search: '' }, history), null)
  const token = loadToken(session, { hash: '#token=a.b.c', pathname: '/', search: '?document=x' }, history)
  assert.equal(token, 'a.b.c')
  assert.deepEqual(replaced, ['/?document=x'])
  assert.equal(loadToken(session, { hash: '', pathname: '/', search: '' }, history), 'a.b.c')
})

function contrastToWhite (color) {
  const [r, g, b] = [1, 3, 5].map(i => {
    const value = parseInt(color.slice(i, i + 2), 16) / 255
    return value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4
  })
  return 1.05 / (0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05)
}
