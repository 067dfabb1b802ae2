/**
 * Bundles `src/` into `dist/`, which is committed and embedded in the node, so that building the node
 * needs no Node.js. The output depends on sources and lockfile only, byte by byte.
 *
 *     node build.js           writes dist/
 *     node build.js --check   fails when dist/ is not what would be written
 */
import { createHash } from 'node:crypto'
import { mkdir, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import path from 'node:path'
import { build } from 'esbuild'

const root = import.meta.dirname
const dist = path.join(root, 'dist')

const files = await bundle()
if (process.argv.includes('--check')) {
  const stale = await difference(files)
  if (stale.length) {
    console.error(`dist/ is stale, run \`node build.js\`: ${stale.join(', ')}`)
    process.exit(1)
  }
} else {
  await rm(dist, { recursive: true, force: true })
  for (const [name, bytes] of files) {
    await mkdir(path.dirname(path.join(dist, name)), { recursive: true })
    await writeFile(path.join(dist, name), bytes)
  }
  for (const [name, bytes] of files) console.log(`${name} ${bytes.length}`)
}

/** Everything that belongs into dist/: path to bytes. */
async function bundle () {
  const { outputFiles, metafile } = await build({
    absWorkingDir: root,
    entryPoints: ['src/main.js', 'src/main.css'],
    outdir: 'assets',
    bundle: true,
    minify: true,
    format: 'esm',
    target: ['chrome123', 'firefox120', 'safari17.5'],
    charset: 'utf8',
    legalComments: 'none',
    metafile: true,
    write: false,
    logLevel: 'warning',
    plugins: [withoutInlineStyle()]
  })
  const assets = new Map(outputFiles.map(file => [path.basename(file.path), Buffer.from(file.contents)]))
  assets.set('icon.svg', await readFile(path.join(root, 'src/icon.svg')))
  assets.set('licenses.txt', await licenses(Object.keys(metafile.inputs)))

  const files = new Map()
  let page = await readFile(path.join(root, 'src/index.html'), 'utf8')
  for (const [name, bytes] of assets) {
    const { name: stem, ext } = path.parse(name)
    const hashed = `assets/${stem}-${createHash('sha256').update(bytes).digest('hex').slice(0, 12)}${ext}`
    files.set(hashed, bytes)
    page = page.replaceAll(`{{${name}}}`, `/${hashed}`)
  }
  files.set('index.html', Buffer.from(page))
  return files
}

/** quill-cursors adds its rules as an inline style, which the page's policy forbids; main.css has them. */
function withoutInlineStyle () {
  return {
    name: 'without-inline-style',
    setup (build) {
      build.onLoad({ filter: /quill-cursors\.js$/ }, async ({ path }) => {
        const parts = (await readFile(path, 'utf8')).split('createElement("style")')
        if (parts.length !== 2) throw new Error(`${path} does not add its style as expected`)
        return { contents: parts.join('createElement("template")') }
      })
    }
  }
}

/** Licence texts of all packages that ended up in the bundle. */
async function licenses (inputs) {
  const names = new Set(inputs.map(input => /node_modules\/((?:@[^/]+\/)?[^/]+)/.exec(input)?.[1]).filter(Boolean))
  const texts = await Promise.all([...names].sort().map(async name => {
    const folder = path.join(root, 'node_modules', name)
    const { version, license } = JSON.parse(await readFile(path.join(folder, 'package.json'), 'utf8'))
    const file = (await readdir(folder)).find(entry => /^licen[cs]e/i.test(entry))
    const text = file ? await readFile(path.join(folder, file), 'utf8') : ''
    return `${name} ${version} (${license})\n\n${text.trim()}\n`
  }))
  return Buffer.from(texts.join(`\n${'-'.repeat(80)}\n\n`))
}

/** Names of files that are missing, superfluous or different in dist/. */
async function difference (files) {
  const present = await readdir(dist, { recursive: true, withFileTypes: true }).catch(() => [])
  const names = present.filter(entry => entry.isFile()).map(entry => path.relative(dist, path.join(entry.parentPath ?? entry.path, entry.name)))
  const superfluous = names.filter(name => !files.has(name))
  const wrong = await Promise.all([...files].map(async ([name, bytes]) => {
    const found = await readFile(path.join(dist, name)).catch(() => null)
    return found?.equals(bytes) ? null : name
  }))
  return [...superfluous, ...wrong.filter(Boolean)].sort()
}
