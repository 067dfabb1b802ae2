/** Quill on y-websocket, kept in this browser as well by y-indexeddb. */
import Quill from 'quill'
import 'quill/dist/quill.snow.css'
import QuillCursors from 'quill-cursors'
import { IndexeddbPersistence } from 'y-indexeddb'
import { QuillBinding } from 'y-quill'
import { WebsocketProvider } from 'y-websocket'
import * as Y from 'yjs'
import { documentName, ofWebsocket, socketAddress } from './state.js'

const doc = new Y.Doc()
const store = new IndexeddbPersistence(documentName, doc)
await store.whenSynced
const provider = new WebsocketProvider(`${socketAddress}/ws`, encodeURIComponent(documentName), doc)
provider.awareness.setLocalStateField('user', { name: 'Quill', color: '#1c5fd0' })
ofWebsocket(provider)

Quill.register('modules/cursors', QuillCursors)
const quill = new Quill('#editor', { theme: 'snow', modules: { cursors: true, toolbar: [['bold', 'italic'], [{ list: 'bullet' }]] } })
const binding = new QuillBinding(doc.getText('quill'), quill, provider.awareness)
binding.quill.focus()
