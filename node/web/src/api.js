/** The server's REST interface, as far as the page needs it. */

const DOCUMENTS = '/api/v1/documents'

/** The server answered, but not with what was asked for. */
export class ApiError extends Error {
  /** @param {number} status @param {string} message */
  constructor (status, message) {
    super(message)
    this.status = status
  }
}

export class Api {
  #token

  /** @param {() => string | null} token is asked anew for each request */
  constructor (token) {
    this.#token = token
  }

  /**
   * One page of the documents, from the one after `after` on.
   * @param {{ after?: string, limit?: number }} [page]
   * @returns {Promise<{ documents: { id: string, updatedAt: number }[], next?: string }>} times in ms since 1970
   */
  async list ({ after, limit = 50 } = {}) {
    const query = new URLSearchParams({ limit: String(limit), ...(after && { after }) })
    return (await this.#request('GET', `${DOCUMENTS}?${query}`)).json()
  }

  /**
   * Creates a document; fails with status 409 when it exists.
   * @param {string} id
   * @returns {Promise<{ id: string }>}
   */
  async create (id) {
    return (await this.#request('POST', DOCUMENTS, { id })).json()
  }

  /** Fails unless the document is there and may be read. @param {string} id */
  async check (id) {
    await this.#request('GET', `${DOCUMENTS}/${encodeURIComponent(id)}`)
  }

  /** Deletes a document for everybody. @param {string} id */
  async delete (id) {
    await this.#request('DELETE', `${DOCUMENTS}/${encodeURIComponent(id)}`)
  }

  async #request (method, path, body) {
    const token = this.#token()
    const response = await fetch(path, {
      method,
      headers: {
        ...(token && { authorization: `Bearer ${token}` }),
        ...(body && { 'content-type': 'application/json' })
      },
      body: body && JSON.stringify(body)
    })
    if (!response.ok) throw new ApiError(response.status, await complaint(response))
    return response
  }
}

const complaint = async response => {
  const text = await response.text()
  try {
    return JSON.parse(text).error ?? text
  } catch {
    return text || `the server answered ${response.status}`
  }
}
