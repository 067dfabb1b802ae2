/** Monaco on Hocuspocus' provider. */
import { HocuspocusProvider } from '@hocuspocus/provider'
import * as monaco from 'monaco-editor/esm/vs/editor/editor.api.js'
import { MonacoBinding } from 'y-monaco'
import { documentName, ofHocuspocus, socketAddress } from './state.js'

self.MonacoEnvironment = { getWorker: () => new Worker('/monaco.worker.js', { type: 'module' }) }

const provider = new HocuspocusProvider({ url: `${socketAddress}/hocuspocus`, name: documentName, token: '' })
provider.awareness.setLocalStateField('user', { name: 'Monaco', color: '#2f7d32' })
ofHocuspocus(provider)

const editor = monaco.editor.create(document.getElementById('editor'), { language: 'plaintext', automaticLayout: true })
const binding = new MonacoBinding(provider.document.getText('quill'), editor.getModel(), new Set([editor]), provider.awareness)
binding.editors.forEach(editor => editor.focus())
