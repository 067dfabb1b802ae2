/** Starts Debian's Chromium, which says nothing to anybody but the pages of a test. */
import { chromium } from 'playwright-core'

export const launch = executablePath => chromium.launch({
  executablePath,
  args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
    '--disable-component-update', '--disable-sync']
})
