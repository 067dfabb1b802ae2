/**
 * Editing traces in the format of the public collection josephg/editing-traces: each transaction has
 * patches `[position, deleted, inserted]` in code points; a concurrent trace also has its agent and
 * parents (indices of transactions), so that each agent's edits can be made against what it knew then.
 */
import { readFile } from 'node:fs/promises'
import { gunzipSync } from 'node:zlib'

/** @param {string} path JSON, gzipped if the name ends so */
export const load = async path => {
  const bytes = await readFile(path)
  const trace = JSON.parse(path.endsWith('.gz') ? gunzipSync(bytes) : bytes)
  if (trace.kind === 'concurrent') return trace
  return { ...trace, numAgents: 1, txns: trace.txns.map(({ patches }, i) => ({ agent: 0, parents: i ? [i - 1] : [], patches })) }
}

/** Yjs orders what was typed at the same place by client id: with these, replays end as the recording did. */
export const clientIdOf = agent => 1001 + agent

/**
 * The trace as one list of steps per agent. A step is a run of the agent's transactions that can be
 * made in one go: it `needs` the first so many steps of each agent (its own predecessors included),
 * and nothing that another agent did refers to its middle. `astral` says that positions in code
 * points differ from positions in UTF-16 units, which Yjs counts.
 * @returns {{ steps: { needs: number[], patches: [number, number, string][] }[][], astral: boolean }}
 */
export const plan = (trace, stepPatches) => {
  const { numAgents, txns } = trace
  // How many transactions of each agent a transaction knows, itself included, as each agent's are a chain.
  const known = []
  const made = new Array(numAgents).fill(0)
  const numbers = txns.map(({ agent }) => made[agent]++)
  const referred = new Set()
  txns.forEach(({ agent, parents }, i) => {
    const vector = new Array(numAgents).fill(0)
    for (const parent of parents) {
      known[parent].forEach((count, a) => { vector[a] = Math.max(vector[a], count) })
      if (txns[parent].agent !== agent) referred.add(parent)
    }
    if (vector[agent] !== numbers[i]) throw new Error(`transaction ${i} does not follow its agent's previous one`)
    vector[agent] += 1
    known.push(vector)
  })

  const steps = Array.from({ length: numAgents }, () => [])
  // For each agent, the number of steps by the number of its transactions they hold.
  const endings = Array.from({ length: numAgents }, () => new Map([[0, 0]]))
  const open = new Array(numAgents).fill(null)
  txns.forEach(({ agent, patches }, i) => {
    const foreign = known[i].map((count, a) => a === agent ? 0 : count)
    let step = open[agent]
    if (!step || step.patches.length >= stepPatches || foreign.some((count, a) => count > step.foreign[a])) {
      step = { foreign, patches: [] }
      steps[agent].push(step)
      open[agent] = step
    }
    step.patches.push(...patches)
    endings[agent].set(numbers[i] + 1, steps[agent].length)
    if (referred.has(i)) open[agent] = null
  })
  return {
    steps: steps.map((list, agent) => list.map(({ foreign, patches }, n) => ({
      needs: foreign.map((count, a) => a === agent ? n : endings[a].get(count)),
      patches
    }))),
    astral: txns.some(({ patches }) => patches.some(([, , inserted]) => /[\ud800-\udfff]/.test(inserted)))
  }
}

/** Makes one patch in a Y.Text. */
export const applyPatch = (text, [position, deleted, inserted], astral) => {
  if (astral) {
    const points = [...text.toString()]
    const units = (from, to) => points.slice(from, to).join('').length
    deleted = units(position, position + deleted)
    position = units(0, position)
  }
  if (deleted) text.delete(position, deleted)
  if (inserted) text.insert(position, inserted)
}
