// Writes yjs-updates.json: seeded editing sessions of three Yjs clients, as the log of a server would
// have them, with the content that Yjs sees at their end. After `npm ci` in tests/clients:
//
//     node node/core/testdata/yjs-updates.mjs > node/core/testdata/yjs-updates.json
const Y = await import(new URL('../../../tests/clients/node_modules/yjs/dist/yjs.mjs', import.meta.url))

const random = seed => () => {
  // mulberry32
  seed = (seed + 0x6d2b79f5) | 0
  let t = Math.imul(seed ^ (seed >>> 15), 1 | seed)
  t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t
  return ((t ^ (t >>> 14)) >>> 0) / 4294967296
}

const session = (seed, edits) => {
  const next = random(seed)
  const below = n => Math.floor(next() * n)
  const pick = list => list[below(list.length)]
  const word = () => pick(['a', 'hello ', 'ä', '日本', 'x\n', 'some longer words '])
  const value = () => pick([
    null, true, false, 0, -1, 65, 1.5, -2147483647, 2 ** 40, 0.1, 'text', '😀', [], {}, [1, [2, { k: 3 }]],
    { a: 1, b: { c: 'd' } }, new Uint8Array([1, 2, 3])
  ])

  const log = []
  const clients = [1, 2, 3].map(n => {
    const doc = new Y.Doc()
    // Ids of 4 bytes, as Yjs 13 draws them, and one of 53 bits, as Yjs 14 does.
    doc.clientID = n === 3 ? Number.MAX_SAFE_INTEGER - below(1000) : 1 + below(2 ** 32 - 1)
    const client = { doc, read: 0 }
    doc.on('update', (update, origin) => origin === 'log' || log.push(update))
    return client
  })
  const receive = (client, upTo) => {
    for (; client.read < upTo; client.read++) Y.applyUpdate(client.doc, log[client.read], 'log')
  }
  const nested = () => pick([
    () => new Y.Map([['k', value()]]), () => Y.Array.from([1, 'two']), () => new Y.Text('nested'),
    () => new Y.XmlElement('p'), () => new Y.XmlText('xml'), () => new Y.XmlFragment()
  ])()
  const edit = doc => {
    const text = doc.getText('text')
    const map = doc.getMap('map')
    const array = doc.getArray('array')
    const xml = doc.getXmlFragment('xml')
    const at = type => below(type.length + 1)
    const remove = type => { if (type.length) { const i = below(type.length); type.delete(i, 1 + below(Math.min(4, type.length - i))) } }
    pick([
      () => text.insert(at(text), word()), () => text.insert(at(text), word()), () => text.insert(at(text), word()),
      () => text.insert(at(text), word(), pick([{ bold: true }, { color: 'red' }, { bold: null }])),
      () => { if (text.length) { const i = below(text.length); text.format(i, 1 + below(text.length - i), pick([{ bold: true }, { bold: null }, { link: { href: '#' } }])) } },
      () => text.insertEmbed(at(text), pick([{ image: 'a.png' }, { n: [1, 2] }])),
      () => remove(text), () => remove(text), () => remove(array), () => remove(xml),
      () => map.set(pick(['a', 'b', 'ä']), pick([value(), { big: 1234567890123456789n }])), () => map.delete(pick(['a', 'b', 'ä'])),
      () => map.set('nested', nested()), () => array.insert(at(array), [value(), value()]), () => array.push([nested()]),
      () => { const child = map.get('nested'); if (child instanceof Y.Map) child.set(pick(['a', 'b']), nested()) },
      () => array.insert(at(array), [new Y.Doc({ guid: `sub-${below(100)}`, autoLoad: next() < 0.5 })]),
      () => { const p = new Y.XmlElement('p'); p.setAttribute('id', word()); p.insert(0, [new Y.XmlText(word())]); xml.insert(at(xml), [p]) },
      () => { const p = xml.length && xml.get(below(xml.length)); if (p instanceof Y.XmlElement) p.setAttribute('id', word()) },
      () => doc.transact(() => { text.insert(0, word()); map.set('a', value()); text.delete(0, 1) })
    ])()
  }

  for (let i = 0; i < edits; i++) {
    const client = pick(clients)
    if (next() < 0.5) receive(client, client.read + below(log.length - client.read + 1))
    edit(client.doc)
  }
  clients.forEach(client => receive(client, log.length))
  const [{ doc }] = clients
  const content = { text: doc.getText('text').toString(), map: doc.getMap('map').toJSON(), array: doc.getArray('array').toJSON(), xml: doc.getXmlFragment('xml').toString() }
  // As `yrs` puts into JSON what JSON has no word for.
  const plain = function (key, v) {
    const raw = this[key]
    return raw instanceof Y.Doc ? { guid: raw.guid } : typeof v === 'bigint' ? Number(v) : v instanceof Uint8Array ? [...v] : v
  }
  return {
    log: log.map(update => Buffer.from(update).toString('hex')),
    state: Buffer.from(Y.encodeStateAsUpdate(doc)).toString('hex'),
    vector: Buffer.from(Y.encodeStateVector(doc)).toString('hex'),
    text: content.text,
    xml: content.xml,
    map: JSON.parse(JSON.stringify(content.map, plain)),
    array: JSON.parse(JSON.stringify(content.array, plain))
  }
}

const sessions = []
for (let seed = 1; seed <= 12; seed++) sessions.push(session(seed, 60))
console.log('[')
console.log(sessions.map(s => JSON.stringify(s)).join(',\n'))
console.log(']')
