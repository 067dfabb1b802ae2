/**
 * Drives Debian's Chromium for a test: takes commands as JSON lines on stdin, `{ id, do, … }`, and
 * answers each with `{ id, value }` or `{ id, error }`, in whatever order they end. Each window has
 * its own storage, as if it were another person's.
 */
import { mkdir } from 'node:fs/promises'
import { dirname } from 'node:path'
import axe from 'axe-core'
import { launch } from './chromium.mjs'
import { options } from './client.mjs'
import { serve } from './commands.mjs'

const { executable, timeoutMs } = options({ executable: '/usr/bin/chromium', timeoutMs: 15_000 })

const browser = await launch(executable)
/** Name to page, with what went wrong in it. */
const windows = new Map()

const commands = {
  async open ({ window, url, name, width = 1200, height = 800, dark = false }) {
    const context = await browser.newContext({ viewport: { width, height }, colorScheme: dark ? 'dark' : 'light' })
    context.setDefaultTimeout(timeoutMs)
    await context.addInitScript(watchLight)
    await context.addInitScript(user, name)
    const page = await context.newPage()
    const problems = []
    page.on('pageerror', error => problems.push(String(error)))
    // A server that is down is part of the tests; what the page itself does wrong is not.
    page.on('console', message => {
      if (message.type() === 'error' && !/ERR_CONNECTION|WebSocket connection/.test(message.text())) problems.push(message.text())
    })
    windows.set(window, { page, problems })
    await page.goto(url)
  },
  /** Types at the start or the end of the text. */
  async type ({ page, text, place = 'End', delayMs = 20 }) {
    await page.locator('.ql-editor[contenteditable=true]').focus()
    await page.keyboard.press(place === 'Start' ? 'Control+Home' : 'Control+End')
    await page.keyboard.type(text, { delay: delayMs })
  },
  async press ({ page, key }) {
    await page.keyboard.press(key)
  },
  async click ({ page, role, name }) {
    await page.getByRole(role, { name, exact: true }).first().click()
  },
  async fill ({ page, label, value }) {
    const field = page.getByLabel(label, { exact: true })
    await field.fill(value)
    await field.blur()
  },
  /** Waits until the light shows a state. */
  async light ({ page, state }) {
    await page.waitForFunction(state => document.getElementById('light').dataset.state === state, state)
  },
  /** Waits until the text holds something. */
  async contains ({ page, text }) {
    await page.waitForFunction(text => document.querySelector('.ql-editor').textContent.includes(text), text)
  },
  /** Waits for an element with a role and a name or text. */
  async sees ({ page, role, name }) {
    await page.getByRole(role, { name }).or(page.getByRole(role).filter({ hasText: name })).first().waitFor()
  },
  async look ({ page, problems }) {
    const seen = await page.evaluate(() => {
      const all = selector => [...document.querySelectorAll(selector)]
      const light = document.getElementById('light')
      return {
        url: location.pathname + location.search + location.hash,
        text: document.querySelector('.ql-editor') ? all('.ql-editor > *').map(line => line.textContent).join('\n') : '',
        light: light.dataset.state,
        unsaved: Number(light.dataset.unsaved),
        states: window.lightStates,
        savedText: window.savedText,
        people: all('#people .person').map(person => person.textContent),
        cursors: all('.ql-cursor:not(.hidden)').map(cursor => ({
          name: cursor.querySelector('.ql-cursor-name').textContent,
          color: getComputedStyle(cursor.querySelector('.ql-cursor-caret')).backgroundColor,
          height: cursor.querySelector('.ql-cursor-caret').getBoundingClientRect().height
        })),
        focus: document.activeElement?.ariaLabel ?? '',
        documents: all('#documents li .name').map(name => name.textContent)
      }
    })
    return { ...seen, problems }
  },
  /** Makes the others' names stand at their cursors, as they do while they type. */
  async hoverCursors ({ page }) {
    await page.evaluate(() => document.querySelectorAll('.ql-cursor-caret-container').forEach(caret => caret.classList.add('hover')))
  },
  /** Breaches of WCAG 2 A and AA that axe finds. */
  async audit ({ page }) {
    await page.evaluate(axe.source)
    const { violations } = await page.evaluate(() => window.axe.run({ runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa'] }))
    return violations.map(({ id, help, nodes }) => `${id}: ${help}: ${nodes.map(node => node.html.slice(0, 120)).join(' | ')}`)
  },
  /** Whether closing the window would make the browser ask. */
  async asksBeforeClosing ({ page }) {
    return page.evaluate(() => !window.dispatchEvent(new Event('beforeunload', { cancelable: true })))
  },
  async download ({ page, name }) {
    const [download] = await Promise.all([page.waitForEvent('download'), page.getByRole('button', { name, exact: true }).click()])
    const chunks = await (await download.createReadStream()).toArray()
    return { name: download.suggestedFilename(), text: Buffer.concat(chunks).toString() }
  },
  async screenshot ({ page, path }) {
    await mkdir(dirname(path), { recursive: true })
    await page.screenshot({ path })
  },
  async close ({ page, window }) {
    await page.context().close()
    windows.delete(window)
  }
}

/** Runs in each page: a user whose browser has been here, and who likes the same colour as all others. */
function user (name) {
  if (localStorage.getItem('user.name')) return
  localStorage.setItem('user.name', name)
  localStorage.setItem('user.color', '#1c5fd0')
}

/** Runs in each page: notes the light's states, and the text each time the light turns to saved. */
function watchLight () {
  window.lightStates = []
  window.savedText = ''
  document.addEventListener('DOMContentLoaded', () => {
    const light = document.getElementById('light')
    new MutationObserver(() => {
      const { state } = light.dataset
      if (state === window.lightStates.at(-1)) return
      window.lightStates.push(state)
      if (state === 'saved') window.savedText = document.querySelector('.ql-editor').textContent
    }).observe(light, { attributes: true, attributeFilter: ['data-state'] })
  })
}

await serve(commands, ({ window }) => windows.get(window), () => browser.close())
