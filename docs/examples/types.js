/** No editor at all: Y.Map, Y.Array and Y.XmlFragment on y-websocket. */
import { WebsocketProvider } from 'y-websocket'
import * as Y from 'yjs'
import { documentName, ofWebsocket, socketAddress } from './state.js'

const doc = new Y.Doc()
const provider = new WebsocketProvider(`${socketAddress}/ws`, encodeURIComponent(documentName), doc)
ofWebsocket(provider)

const settings = doc.getMap('settings')
const tasks = doc.getArray('tasks')
const outline = doc.getXmlFragment('outline')

document.getElementById('editor').innerHTML = `
  <form><label>Task <input name="task"></label> <button>Add</button></form>
  <ul></ul>
  <label><input type="checkbox" name="done"> All done</label>
  <pre></pre>`
const [form, list, outlineText] = ['form', 'ul', 'pre'].map(tag => document.querySelector(`#editor ${tag}`))
const done = document.querySelector('[name=done]')

form.addEventListener('submit', event => {
  event.preventDefault()
  const text = form.elements.task.value
  doc.transact(() => {
    tasks.push([new Y.Map(Object.entries({ text }))])
    const item = new Y.XmlElement('task')
    item.insert(0, [new Y.XmlText(text)])
    outline.insert(outline.length, [item])
  })
  form.reset()
})
done.addEventListener('change', () => settings.set('done', done.checked))

const show = () => {
  list.replaceChildren(...tasks.map(task => Object.assign(document.createElement('li'), { textContent: task.get('text') })))
  done.checked = settings.get('done') ?? false
  outlineText.textContent = outline.toString()
}
for (const type of [settings, tasks, outline]) type.observeDeep(show)
