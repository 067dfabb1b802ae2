/**
 * How a script serves a test that commands it: takes JSON lines on stdin, `{ id, do, … }`, and answers each with
 * `{ id, value }` or `{ id, error }`, in whatever order they end. Answers 0 when it is ready; ends with stdin.
 */
import { createInterface } from 'node:readline'
import { print } from './client.mjs'

/** `given` says what a command gets beside its own fields; `end` is waited for at the end. */
export const serve = async (commands, given, end = () => {}) => {
  const answer = async ({ id, do: command, ...rest }) => {
    try {
      if (!Object.hasOwn(commands, command)) throw new Error(`no command ${command}`)
      await print({ id, value: await commands[command]({ ...given(rest, command), ...rest }) ?? null })
    } catch (error) {
      await print({ id, error: String(error) })
    }
  }
  createInterface({ input: process.stdin })
    .on('line', line => answer(JSON.parse(line)))
    .on('close', async () => {
      await end()
      process.exit(0)
    })
  await print({ id: 0, value: null })
}
