/** CodeMirror 6 on y-sweet's client. Its token, and the address to go to, come from the application's server. */
import { createYjsProvider } from '@y-sweet/client'
import { markdown } from '@codemirror/lang-markdown'
import { EditorState } from '@codemirror/state'
import { basicSetup, EditorView } from 'codemirror'
import { yCollab } from 'y-codemirror.next'
import * as Y from 'yjs'
import { documentName, ofYSweet } from './state.js'

const doc = new Y.Doc()
const provider = createYjsProvider(doc, documentName, '/auth', { showDebuggerLink: false })
provider.awareness.setLocalStateField('user', { name: 'CodeMirror', color: '#b4327a', colorLight: '#b4327a33' })
ofYSweet(provider)

const text = doc.getText('quill')
const undoManager = new Y.UndoManager(text)
const view = new EditorView({
  parent: document.getElementById('editor'),
  state: EditorState.create({
    doc: text.toString(),
    extensions: [basicSetup, markdown(), EditorView.lineWrapping, yCollab(text, provider.awareness, { undoManager })]
  })
})
view.focus()
