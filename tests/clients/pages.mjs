/**
 * Pages of the examples in Debian's Chromium: takes commands as JSON lines on stdin, `{ id, do, … }`, and answers
 * each with `{ id, value }` or `{ id, error }`, in whatever order they end. Each page has its own storage.
 */
import { createInterface } from 'node:readline'
import { chromium } from 'playwright-core'
import { options, print } from './client.mjs'

const { executable, timeoutMs } = options({ executable: '/usr/bin/chromium', timeoutMs: 30_000 })
const browser = await chromium.launch({
  executablePath: executable,
  args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
    '--disable-component-update', '--disable-sync']
})
const pages = new Map()

const commands = {
  async open ({ name, url }) {
    const context = await browser.newContext()
    context.setDefaultTimeout(timeoutMs)
    const page = await context.newPage()
    const problems = []
    page.on('pageerror', error => problems.push(String(error)))
    page.on('console', message => {
      if (message.type() === 'error') problems.push(message.text())
    })
    pages.set(name, { page, problems })
    await page.goto(url)
  },
  async types ({ page, into, text }) {
    await page.locator(into).first().click()
    await page.keyboard.press('Control+End')
    await page.keyboard.type(text, { delay: 10 })
  },
  async presses ({ page, key }) {
    await page.keyboard.press(key)
  },
  /** Waits until an element holds a text, as it is shown or as the value of a field. */
  async shows ({ page, element, text }) {
    await page.waitForFunction(({ element, text }) => {
      const found = document.querySelector(element)
      // Editors draw spaces as they like.
      return (found?.value || found?.innerText || '').replaceAll('\u00a0', ' ').includes(text)
    }, { element, text })
  },
  async signs ({ page, state }) {
    await page.waitForFunction(state => document.getElementById('state').value === state, state)
  },
  async reload ({ page }) {
    await page.reload()
  },
  async problems ({ problems }) {
    return problems
  }
}

const answer = async ({ id, do: command, ...rest }) => {
  try {
    if (!Object.hasOwn(commands, command)) throw new Error(`no command ${command}`)
    await print({ id, value: await commands[command]({ ...pages.get(rest.name), ...rest }) ?? null })
  } catch (error) {
    await print({ id, error: String(error) })
  }
}

createInterface({ input: process.stdin })
  .on('line', line => answer(JSON.parse(line)))
  .on('close', async () => {
    await browser.close()
    process.exit(0)
  })
await print({ id: 0, value: null })
