/**
 * Random histories of three Yjs clients, for whoever wants to hold another library against Yjs.
 *
 * Each line of standard input asks for something, each answer is a line:
 *
 * - `{ begin: seed, edits, splits }`: a new history. Answers `{ log }`, what the clients sent, in an order that a
 *   server could have it in. With `splits` edits may fall between the halves of a character.
 * - `{ others, edits }`: what someone else wrote, who knew any part of the log. The clients get it, go on, and
 *   end with all there is. Answers `{ log, ...state }`.
 * - `{ read }`: any update. Answers the state of a new document that holds it alone.
 *
 * Updates are hex. A state is `{ update, vector, deletes, content }`.
 */
import { createInterface } from 'node:readline'
import { isDeepStrictEqual } from 'node:util'
import { print } from './client.mjs'
import * as Y from 'yjs'

const random = seed => () => {
  // mulberry32
  seed = (seed + 0x6d2b79f5) | 0
  let t = Math.imul(seed ^ (seed >>> 15), 1 | seed)
  t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t
  return ((t ^ (t >>> 14)) >>> 0) / 4294967296
}

const hex = bytes => Buffer.from(bytes).toString('hex')
const unhex = text => new Uint8Array(Buffer.from(text, 'hex'))

/** As `yrs` puts into JSON what JSON has no word for. */
const plain = function (key, value) {
  const raw = this[key]
  if (raw instanceof Y.Doc) return { guid: raw.guid }
  return typeof value === 'bigint' ? Number(value) : value instanceof Uint8Array ? [...value] : value
}

const state = doc => {
  const update = Y.encodeStateAsUpdate(doc)
  const { ds } = Y.decodeUpdate(update)
  const ranges = [...ds.clients].map(([client, items]) => [client, items.map(({ clock, len }) => [clock, len])])
  const vector = [...Y.decodeStateVector(Y.encodeStateVector(doc))]
  const content = {
    text: doc.getText('text').toDelta(),
    map: doc.getMap('map').toJSON(),
    array: doc.getArray('array').toJSON(),
    xml: doc.getXmlFragment('xml').toString()
  }
  const byClient = (a, b) => a[0] - b[0]
  return {
    update: hex(update),
    vector: vector.sort(byClient),
    deletes: ranges.sort(byClient),
    content: JSON.parse(JSON.stringify(content, plain))
  }
}

/** The clients of one history; `log` is what they sent since it was last taken. */
class History {
  constructor (seed, splits) {
    this.next = random(seed)
    this.splits = splits
    this.log = []
    this.clients = [1, 2, 3].map(n => {
      const doc = new Y.Doc()
      // Ids of 4 bytes, as Yjs 13 draws them, and one of 53 bits, as Yjs 14 does.
      doc.clientID = n === 3 ? Number.MAX_SAFE_INTEGER - this.below(1000) : 1 + this.below(2 ** 32 - 1)
      const types = [doc.getText('text'), doc.getMap('map'), doc.getArray('array')]
      const undo = new Y.UndoManager(types, { captureTimeout: this.below(2) * 500 })
      doc.on('update', (update, origin) => origin === 'log' || this.log.push(update))
      return { doc, undo, read: 0 }
    })
  }

  below (n) { return Math.floor(this.next() * n) }
  pick (list) { return list[this.below(list.length)] }

  receive (client, upTo) {
    for (; client.read < upTo; client.read++) Y.applyUpdate(client.doc, this.log[client.read], 'log')
  }

  run (edits) {
    for (let i = 0; i < edits; i++) {
      const client = this.pick(this.clients)
      if (this.next() < 0.5) this.receive(client, client.read + this.below(this.log.length - client.read + 1))
      this.edit(client)
    }
  }

  /** A place in a text, between characters unless halves are wanted. Embeds count one. */
  place (text) {
    const units = text.toDelta().map(({ insert }) => typeof insert === 'string' ? insert : '.').join('')
    const at = this.below(units.length + 1)
    const inside = units.charCodeAt(at) >= 0xdc00 && units.charCodeAt(at) < 0xe000
    return inside && !this.splits ? at - 1 : at
  }

  value () {
    return this.pick([
      null, true, false, 0, -1, 65, 1.5, -2147483647, 2 ** 40, 0.1, 'text', '😀', [], {}, [1, [2, { k: 3 }]],
      { a: 1, b: { c: 'd' } }, new Uint8Array([1, 2, 3])
    ])
  }

  nested () {
    return this.pick([
      () => new Y.Map([['k', this.value()]]), () => Y.Array.from([1, 'two']), () => new Y.Text('nested'),
      () => new Y.XmlElement('p'), () => new Y.XmlText('xml'), () => new Y.XmlFragment()
    ])()
  }

  edit ({ doc, undo }) {
    const text = doc.getText('text')
    const map = doc.getMap('map')
    const array = doc.getArray('array')
    const xml = doc.getXmlFragment('xml')
    const at = type => this.below(type.length + 1)
    const word = () => this.pick(['a', 'hello ', 'ä', '日本', 'x\n', 'some longer words ', '😀', 'a👩‍👩‍👧b'])
    const plainWord = () => this.pick(['a', 'hello ', 'ä', '日本', 'x'])
    const range = () => [this.place(text), this.place(text)].sort((a, b) => a - b)
    const remove = type => {
      if (type.length === 0) return
      const i = this.below(type.length)
      type.delete(i, 1 + this.below(Math.min(4, type.length - i)))
    }
    const format = () => this.pick([{ bold: true }, { bold: null }, { color: 'red' }, { link: { href: '#' } }])
    this.pick([
      () => text.insert(this.place(text), word()), () => text.insert(this.place(text), word()),
      () => text.insert(this.place(text), word()), () => text.insert(this.place(text), word(), format()),
      () => { const [from, to] = range(); if (from < to) text.format(from, to - from, format()) },
      () => { const [from, to] = range(); if (from < to) text.format(from, to - from, format()) },
      () => { const [from, to] = range(); if (from < to) text.delete(from, to - from) },
      () => { const [from, to] = range(); if (from < to && to - from < 6) text.delete(from, to - from) },
      () => text.insertEmbed(this.place(text), this.pick([{ image: 'a.png' }, { n: [1, 2] }]), this.pick([undefined, { bold: true }])),
      () => remove(array), () => remove(xml), () => undo.undo(), () => undo.undo(), () => undo.redo(),
      () => map.set(this.pick(['a', 'b', 'ä']), this.pick([this.value(), { big: 1234567890123456789n }])),
      () => map.delete(this.pick(['a', 'b', 'ä'])), () => map.set('nested', this.nested()),
      () => array.insert(at(array), [this.value(), this.value()]), () => array.push([this.nested()]),
      () => { const child = map.get('nested'); if (child instanceof Y.Map) child.set(this.pick(['a', 'b']), this.nested()) },
      () => { const child = map.get('nested'); if (child?.constructor === Y.Text) child.insert(at(child), plainWord(), format()) },
      () => { const child = array.length && array.get(this.below(array.length)); if (child instanceof Y.Array) remove(child) },
      () => array.insert(at(array), [new Y.Doc({ guid: `sub-${this.below(100)}`, autoLoad: this.next() < 0.5 })]),
      () => { const p = new Y.XmlElement('p'); p.setAttribute('id', plainWord()); p.insert(0, [new Y.XmlText(plainWord())]); xml.insert(at(xml), [p]) },
      () => { const p = xml.length && xml.get(this.below(xml.length)); if (p instanceof Y.XmlElement) p.setAttribute('id', plainWord()) },
      () => { const p = xml.length && xml.get(this.below(xml.length)); if (p instanceof Y.XmlElement) p.insert(at(p), [new Y.XmlElement('b')]) },
      () => doc.transact(() => { text.insert(0, word()); map.set('a', this.value()); text.delete(0, 1) })
    ])()
  }
}

let history
let taken = 0
const take = () => {
  const log = history.log.slice(taken).map(hex)
  taken = history.log.length
  return log
}

const answer = ({ begin, others, read, edits, splits }) => {
  if (begin !== undefined) {
    history = new History(begin, splits)
    taken = 0
    history.run(edits)
    return { log: take() }
  }
  if (others !== undefined) {
    history.log.push(...others.map(unhex))
    taken = history.log.length
    history.run(edits)
    // Who receives formats may remove those that have become superfluous, and sends that.
    while (history.clients.some(({ read }) => read < history.log.length)) {
      history.clients.forEach(client => history.receive(client, history.log.length))
    }
    const [first, ...rest] = history.clients.map(({ doc }) => state(doc))
    return { log: take(), agreed: rest.every(({ content }) => isDeepStrictEqual(content, first.content)), ...first }
  }
  const doc = new Y.Doc()
  Y.applyUpdate(doc, unhex(read))
  return state(doc)
}

for await (const line of createInterface({ input: process.stdin })) await print(answer(JSON.parse(line)))
