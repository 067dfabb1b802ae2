/**
 * Serves the examples, and is what your own server would be: the browser asks it for tokens, never for the secret.
 *
 *     node server.mjs --node http://127.0.0.1:8080 --port 3000 [--token SERVER_TOKEN]
 *
 * `--token` is a token of the cluster whose scope is `server`; a node without authentication needs none.
 */
import { readFile } from 'node:fs/promises'
import { createServer } from 'node:http'
import path from 'node:path'
import { parseArgs } from 'node:util'
import { DocumentManager } from '@y-sweet/sdk'
import { build } from 'esbuild'

const root = import.meta.dirname
const { values: { node, port, token } } = parseArgs({
  options: {
    node: { type: 'string', default: 'http://127.0.0.1:8080' },
    port: { type: 'string', default: '3000' },
    token: { type: 'string' }
  }
})
const examples = ['quill', 'codemirror', 'monaco', 'tiptap', 'types']
const types = { '.css': 'text/css', '.js': 'text/javascript', '.ttf': 'font/ttf' }

const { outputFiles } = await build({
  absWorkingDir: root,
  entryPoints: {
    ...Object.fromEntries(examples.map(name => [name, `${name}.js`])),
    'monaco.worker': 'monaco-editor/esm/vs/editor/editor.worker.js'
  },
  outdir: 'assets',
  bundle: true,
  format: 'esm',
  loader: { '.ttf': 'file' },
  write: false,
  logLevel: 'warning'
})
const assets = new Map(outputFiles.map(({ path: name, contents }) => [path.basename(name), contents]))
const page = await readFile(path.join(root, 'page.html'), 'utf8')

/** y-sweet's SDK, with the cluster's address as its connection string. */
const manager = new DocumentManager(node.replace(/^http/, 'ys').replace('://', token ? `://${encodeURIComponent(token)}@` : '://'))

createServer(async (request, response) => {
  const { pathname } = new URL(request.url, 'http://localhost')
  const name = pathname.slice(1) || 'quill'
  try {
    if (request.method === 'POST' && pathname === '/auth') {
      // Here you would look who is logged in, and what they may do.
      const { docId } = JSON.parse(Buffer.concat(await request.toArray()))
      const clientToken = await manager.getOrCreateDocAndToken(docId, { authorization: 'full', userId: 'ada' })
      response.setHeader('content-type', 'application/json').end(JSON.stringify(clientToken))
    } else if (examples.includes(name)) {
      const style = assets.has(`${name}.css`) ? `<link rel="stylesheet" href="/${name}.css">` : ''
      const html = page.replaceAll('{{name}}', name).replace('{{node}}', node).replace('{{style}}', style)
      response.setHeader('content-type', 'text/html; charset=utf-8').end(html)
    } else if (assets.has(name)) {
      response.setHeader('content-type', types[path.extname(name)]).end(assets.get(name))
    } else {
      response.writeHead(404).end()
    }
  } catch (error) {
    console.error(error)
    response.writeHead(500).end(String(error))
  }
}).listen(Number(port), '127.0.0.1', () => console.log(`http://127.0.0.1:${port}/${examples[0]}?document=notes`))
