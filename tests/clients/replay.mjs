/**
 * Replays a trace in many documents at once, each agent of each document through a stock client at
 * one node, as fast as receipts come back. Each agent makes its edits in a replica of its own, against
 * exactly what its trace says that it knew; what the other did is let in there only once it has really
 * arrived over the wire. Prints a `replayed` per document: texts of the agents and of a fresh client
 * as hashes, and whether they equal the trace's end.
 */
import * as Y from 'yjs'
import { Client, hash, leave, now, options, print, sleep, stopped, until } from './client.mjs'
import { applyPatch, clientIdOf, load, plan } from './trace.mjs'

const { nodes, documents, trace: path, token, stepPatches, inFlight, transactions, timeoutMs } = options({
  nodes: ['http://127.0.0.1:8080'],
  documents: ['replay-0'],
  trace: new URL('../fixtures/two-writers.json', import.meta.url).pathname,
  token: null,
  /** most patches in one update */
  stepPatches: 100,
  /** most updates of one agent without a receipt */
  inFlight: 8,
  /** replay only so many transactions from the beginning; 0: all */
  transactions: 0,
  timeoutMs: 300_000
})
/** One writer of one document. */
class Agent {
  /** Own steps as updates, and the own clock after each. */
  updates = []
  clocks = [0]

  constructor (document, number, node) {
    this.number = number
    this.client = new Client({ node, document, token })
    this.replica = new Y.Doc()
    this.replica.clientID = clientIdOf(number)
    this.text = this.replica.getText('quill')
    this.admitted = new Array(steps.length).fill(0)
    this.replica.on('update', (update, origin) => {
      if (origin !== this) return
      this.updates.push(update)
      this.clocks.push(Y.getState(this.replica.store, this.replica.clientID))
    })
  }

  /** Makes all own steps, each as soon as all that it needs has arrived. */
  async play (agents) {
    await patience(() => this.client.synced, `${this.client.document} did not sync`)
    for (const { needs, patches } of steps[this.number]) {
      await patience(() => this.client.version - this.client.confirmed < inFlight && this.arrived(agents, needs),
        `${this.client.document} did not get on`)
      this.admit(agents, needs)
      this.replica.transact(() => {
        for (const patch of patches) applyPatch(this.text, patch, astral)
        // A step that only deletes would leave no trace in the state vector.
        this.replica.getMap('steps').set(String(this.number), this.updates.length + 1)
      }, this)
      Y.applyUpdate(this.client.doc, this.updates.at(-1), this)
    }
  }

  /** Whether the first `counts[a]` steps of each agent a have arrived at this agent's client. */
  arrived (agents, counts) {
    return agents.every(({ clocks, replica: { clientID } }, a) =>
      clocks.length > counts[a] && Y.getState(this.client.doc.store, clientID) >= clocks[counts[a]])
  }

  /** Lets the first `counts[a]` steps of each agent a into the replica. */
  admit (agents, counts) {
    agents.forEach(({ updates, number }, a) => {
      if (number === this.number) return
      while (this.admitted[a] < counts[a]) Y.applyUpdate(this.replica, updates[this.admitted[a]++])
    })
  }
}

stopped().then(() => process.exit(0))

const trace = await load(path)
const whole = transactions === 0 || transactions >= trace.txns.length
if (!whole) trace.txns = trace.txns.slice(0, transactions)
const { steps, astral } = plan(trace, stepPatches)
const deadline = now() + timeoutMs
await Promise.all(documents.map(replay))
await leave()

async function replay (document, d) {
  const begun = now()
  const agents = steps.map((_, agent) => new Agent(document, agent, nodes[(d + agent) % nodes.length]))
  await Promise.all(agents.map(agent => agent.play(agents)))
  const all = steps.map(list => list.length)
  await patience(() => agents.every(agent => agent.client.saved && agent.arrived(agents, all)),
    `the edits of ${document} did not all arrive`)
  for (const agent of agents) agent.admit(agents, all)

  const fresh = new Client({ node: nodes[(d + agents.length) % nodes.length], document, token })
  await patience(() => fresh.synced, `a fresh client of ${document} did not sync`)
  const replicas = agents.map(agent => agent.text.toString())
  const texts = [...agents.map(agent => agent.client.text.toString()), fresh.text.toString()]
  await print({
    kind: 'replayed',
    document,
    nodes: [...agents.map(agent => agent.client.node), fresh.node],
    updates: agents.reduce((sum, agent) => sum + agent.client.version, 0),
    durationMs: now() - begun,
    length: texts[0].length,
    hashes: texts.map(hash),
    agree: [...texts, ...replicas].every(text => text === texts[0]),
    /** null when only a part was replayed */
    equalsTrace: whole ? texts[0] === trace.endContent : null
  })
  for (const client of [...agents.map(agent => agent.client), fresh]) client.close()
}

/** Waits until `condition` holds, or ends the script with a complaint. */
async function patience (condition, complaint) {
  // Most of what is waited for comes with the next frame.
  for (let turn = 0; turn < 20 && !condition(); turn++) await new Promise(setImmediate)
  if (condition() || await until(condition, deadline - now(), 2)) return
  console.error(complaint)
  await sleep(10)
  process.exit(1)
}
