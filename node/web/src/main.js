/** The page: finds its elements, opens the document that the address names, and connects the parts. */
import { Api, ApiError } from './api.js'
import { addressOf, DocumentList } from './documents.js'
import { bindEditor } from './editor.js'
import { distinctColor, loadToken, loadUser, randomName, saveToken, saveUser } from './identity.js'
import { Session } from './session.js'

const $ = id => document.getElementById(id)

/** What the light says in each state. */
const STATES = {
  saved: () => 'Saved',
  unsaved: () => 'Unsaved changes',
  offline: unsaved => unsaved ? 'Not connected, unsaved changes' : 'Not connected'
}

let token = loadToken(sessionStorage, location, history)
const user = loadUser(localStorage)
const api = new Api(() => token)
const current = new URLSearchParams(location.search).get('document') || null
const documents = new DocumentList({ root: $('documents'), api, current })

const session = current === null ? null : openDocument(current)
$('welcome').hidden = session !== null
$('document').hidden = session === null

refreshDocuments()
$('refresh').addEventListener('click', refreshDocuments)
document.addEventListener('visibilitychange', () => document.hidden || refreshDocuments())
for (const button of document.querySelectorAll('.new-document')) button.addEventListener('click', askForNewDocument)
$('show-documents').addEventListener('click', () => {
  const shown = $('side').classList.toggle('shown')
  $('show-documents').setAttribute('aria-expanded', String(shown))
})

/** Opens a document in the editor. */
function openDocument (name) {
  document.title = `${name} · collabcluster`
  $('title').textContent = name
  const session = new Session({ url: `${location.origin.replace(/^http/, 'ws')}/ws`, name, token, user })
  const editor = bindEditor({ container: $('editor'), toolbar: $('toolbar'), session })
  editor.enable(false)

  session.on('ready', () => {
    editor.enable(!readOnly(token))
    editor.focus()
    refreshDocuments()
  })
  session.on('state', showState)
  session.on('people', people => {
    showPeople(people)
    const color = distinctColor(people)
    // For this visit only: the colour that the browser remembers stays the one we like.
    if (color !== people[0].color) session.introduce({ name: user.name, color })
  })
  session.on('unreachable', probe)
  session.on('denied', reason => {
    editor.enable(false)
    notify(`The server refuses this document: ${reason}`)
  })
  window.addEventListener('beforeunload', event => {
    if (session.receipts.unsaved) event.preventDefault()
  })

  const name_ = $('name')
  name_.value = user.name
  name_.addEventListener('change', () => {
    user.name = name_.value.trim() || randomName()
    name_.value = user.name
    saveUser(localStorage, user)
    session.introduce({ ...user, color: session.people[0].color })
  })
  $('download').addEventListener('click', () => download(`${name}.txt`, editor.text()))
  $('delete').addEventListener('click', () => askToDelete(session))
  session.open()
  return session
}

function showState (state, unsaved) {
  const light = $('light')
  const before = light.dataset.state
  light.dataset.state = state
  light.dataset.unsaved = String(unsaved)
  $('light-text').textContent = STATES[state](unsaved)
  // Screen readers hear of lost and regained connections, not of every keystroke.
  if ((state === 'offline') !== (before === 'offline')) {
    $('announcement').textContent = state === 'offline' ? 'Not connected' : 'Connected'
  }
}

function showPeople (people) {
  $('people').replaceChildren(...people.map(({ name, color, self }) => {
    const person = document.createElement('li')
    const badge = document.createElement('span')
    badge.className = 'badge'
    badge.style.backgroundColor = color
    badge.ariaHidden = 'true'
    badge.textContent = name.split(/\s+/, 2).map(word => [...word][0] ?? '').join('').toUpperCase()
    const label = document.createElement('span')
    label.className = 'person'
    label.textContent = self ? `${name} (you)` : name
    person.title = label.textContent
    person.append(badge, label)
    return person
  }))
}

function notify (message) {
  $('notice').textContent = message
  $('notice').hidden = false
}

async function refreshDocuments () {
  try {
    await documents.refresh()
    $('list-error').hidden = true
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) return askForToken()
    $('list-error').textContent = `The list is not available: ${error.message}`
    $('list-error').hidden = false
  }
}

/** A socket that was refused does not say why; a request does. */
async function probe () {
  try {
    await api.check(current)
  } catch (error) {
    // The document need not exist yet, and a server that is away will be back.
    if (!(error instanceof ApiError) || error.status === 404 || error.status >= 500) return
    if (error.status === 401) return askForToken()
    session.pause()
    notify(`The server refuses this document: ${error.message}`)
  }
}

function askForToken () {
  if ($('token-dialog').open) return
  ask($('token-dialog'), data => {
    token = data.get('token').trim()
    saveToken(sessionStorage, token)
    $('notice').hidden = true
    session?.authorize(token)
    refreshDocuments()
  })
}

function askForNewDocument () {
  const dialog = $('new-dialog')
  dialog.querySelector('input').value = `${randomName()} ${Math.floor(Math.random() * 90) + 10}`.toLowerCase().replaceAll(' ', '-')
  ask(dialog, async data => {
    const { id } = await api.create(data.get('id').trim())
    location.assign(addressOf(id))
  })
}

function askToDelete (session) {
  $('delete-name').textContent = session.name
  ask($('delete-dialog'), async () => {
    await api.delete(session.name)
    session.close()
    location.assign('/')
  })
}

/** Shows a dialog until it is cancelled or `act` succeeds; what goes wrong is shown in the dialog. */
function ask (dialog, act) {
  const form = dialog.querySelector('form')
  const error = dialog.querySelector('.error')
  error.hidden = true
  form.onsubmit = async event => {
    event.preventDefault()
    try {
      await act(new FormData(form))
      dialog.close()
    } catch (failure) {
      error.textContent = failure.status === 409 ? 'A document with this name exists already.' : failure.message
      error.hidden = false
    }
  }
  dialog.querySelector('.cancel').onclick = () => dialog.close()
  dialog.showModal()
  dialog.querySelector('input')?.select()
}

function download (name, text) {
  const link = document.createElement('a')
  link.href = URL.createObjectURL(new Blob([text], { type: 'text/plain;charset=utf-8' }))
  link.download = name
  link.click()
  setTimeout(() => URL.revokeObjectURL(link.href), 0)
}

/** Whether a token says that it is for reading only. The server decides; the page just does not pretend. */
function readOnly (token) {
  try {
    const claims = token.split('.')[1].replaceAll('-', '+').replaceAll('_', '/')
    return JSON.parse(atob(claims)).scope === 'read'
  } catch {
    return false
  }
}
