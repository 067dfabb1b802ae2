/** Who the user is: a name and colour that this browser remembers, a token that this tab does. */

const ADJECTIVES = ['Amber', 'Brave', 'Calm', 'Clever', 'Eager', 'Gentle', 'Happy', 'Kind', 'Lively', 'Lucky', 'Mellow',
  'Nimble', 'Proud', 'Quick', 'Quiet', 'Sunny']
const ANIMALS = ['Badger', 'Crane', 'Dolphin', 'Falcon', 'Fox', 'Hare', 'Heron', 'Lynx', 'Magpie', 'Otter', 'Owl', 'Panda',
  'Raven', 'Seal', 'Swift', 'Wren']
/** White text on each of them has a contrast of at least 4.5. */
export const COLORS = ['#1c5fd0', '#b3261e', '#0f766e', '#7a3fc0', '#a8480b', '#1e7a3c', '#b0246f', '#5b6200']

const pick = list => list[Math.floor(Math.random() * list.length)]

/** Two random words. */
export const randomName = () => `${pick(ADJECTIVES)} ${pick(ANIMALS)}`

/**
 * Name and colour, made up at the first visit.
 * @param {Storage} storage
 */
export const loadUser = storage => {
  const name = storage.getItem('user.name') || randomName()
  const stored = storage.getItem('user.color')
  const color = COLORS.includes(stored) ? stored : pick(COLORS)
  const user = { name, color }
  saveUser(storage, user)
  return user
}

/**
 * Our colour among these people: the one we like, unless somebody who has it goes first.
 * @param {{ id: number, color: string, self: boolean }[]} people
 */
export const distinctColor = people => {
  const self = people.find(person => person.self)
  const others = people.filter(person => !person.self)
  if (!others.some(({ id, color }) => color === self.color && id < self.id)) return self.color
  return COLORS.find(color => !others.some(other => other.color === color)) ?? self.color
}

/** @param {Storage} storage @param {{ name: string, color: string }} user */
export const saveUser = (storage, { name, color }) => {
  storage.setItem('user.name', name)
  storage.setItem('user.color', color)
}

/**
 * The token of this tab. One that arrives in the address (`#token=…`) is kept and taken out of the
 * address, so that it is neither bookmarked nor shared with it.
 * @param {Storage} storage @param {Location} location @param {History} history
 */
export const loadToken = (storage, location, history) => {
  const given = new URLSearchParams(location.hash.slice(1)).get('token')
  if (given) {
    storage.setItem('token', given)
    history.replaceState(null, '', location.pathname + location.search)
  }
  return storage.getItem('token')
}

/** @param {Storage} storage @param {string} token */
export const saveToken = (storage, token) => storage.setItem('token', token)
