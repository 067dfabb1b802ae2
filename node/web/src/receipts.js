/**
 * What the server has confirmed as durable, as numbers: pure, without a socket or a page.
 *
 * Each local edit raises `version`. The client sends its version after the edit, and the server
 * returns it once everything it got before is committed. So one returned version covers all edits
 * up to it, a late or repeated one does no harm, and what was typed while offline stays unsaved
 * until its version comes back on a later connection.
 */
export class Receipts {
  /** Version of the newest local edit. */
  version = 0
  /** Newest version that the server returned. */
  confirmed = 0

  /** Counts a local edit. */
  edited () {
    this.version += 1
  }

  /**
   * Takes a version that the server returned. One that was never sent confirms nothing.
   * @param {number} version
   */
  confirm (version) {
    if (this.confirmed < version && version <= this.version) this.confirmed = version
  }

  /** Number of edits that may still be lost with this page. */
  get unsaved () {
    return this.version - this.confirmed
  }
}
