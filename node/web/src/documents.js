/** The list of documents beside the text. */

const AGES = [['year', 31_536_000], ['month', 2_592_000], ['day', 86_400], ['hour', 3_600], ['minute', 60]]
const relative = new Intl.RelativeTimeFormat('en', { numeric: 'auto', style: 'short' })

/** How long ago `time` was, in words. @param {number} time @param {number} now both in ms */
export const age = (time, now) => {
  const seconds = Math.round((now - time) / 1000)
  const unit = AGES.find(([, length]) => seconds >= length)
  return unit ? relative.format(-Math.floor(seconds / unit[1]), unit[0]) : 'just now'
}

/** Address of a document on this page. @param {string} id */
export const addressOf = id => `/?document=${encodeURIComponent(id)}`

export class DocumentList {
  #api
  #current
  #list
  #more
  #empty
  #next

  /** @param {{ root: HTMLElement, api: import('./api.js').Api, current: string | null }} parts */
  constructor ({ root, api, current }) {
    this.#api = api
    this.#current = current
    this.#list = root.querySelector('ul')
    this.#empty = root.querySelector('.empty')
    this.#more = root.querySelector('.more')
    this.#more.addEventListener('click', () => this.#load(this.#next))
  }

  /** Reads the list from its beginning. */
  refresh () {
    return this.#load()
  }

  async #load (after) {
    const { documents, next } = await this.#api.list({ after })
    const items = documents.map(document => this.#item(document))
    if (after) this.#list.append(...items)
    else this.#list.replaceChildren(...items)
    this.#next = next
    this.#more.hidden = !next
    this.#empty.hidden = this.#list.children.length > 0
  }

  #item ({ id, updatedAt }) {
    const link = document.createElement('a')
    link.href = addressOf(id)
    if (id === this.#current) link.setAttribute('aria-current', 'page')
    const name = document.createElement('span')
    name.className = 'name'
    name.textContent = id
    link.append(name)
    const when = document.createElement('time')
    when.dateTime = new Date(updatedAt).toISOString()
    when.textContent = age(updatedAt, Date.now())
    link.append(when)
    const item = document.createElement('li')
    item.append(link)
    return item
  }
}
