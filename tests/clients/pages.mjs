/**
 * Pages of the examples in Debian's Chromium: takes commands as JSON lines on stdin, `{ id, do, … }`, and answers
 * each with `{ id, value }` or `{ id, error }`, in whatever order they end. Each page has its own storage.
 */
import { launch } from './chromium.mjs'
import { options } from './client.mjs'
import { serve } from './commands.mjs'

const { executable, timeoutMs } = options({ executable: '/usr/bin/chromium', timeoutMs: 30_000 })
const browser = await launch(executable)
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

await serve(commands, ({ name }) => pages.get(name), () => browser.close())
