/** Tiptap on Hocuspocus' provider: two documents, title and body, on one socket. */
import { HocuspocusProvider, HocuspocusProviderWebsocket } from '@hocuspocus/provider'
import { Editor } from '@tiptap/core'
import Collaboration from '@tiptap/extension-collaboration'
import CollaborationCaret from '@tiptap/extension-collaboration-caret'
import StarterKit from '@tiptap/starter-kit'
import { documentName, ofHocuspocus, socketAddress } from './state.js'

const websocketProvider = new HocuspocusProviderWebsocket({ url: `${socketAddress}/hocuspocus` })
const open = name => {
  const provider = new HocuspocusProvider({ websocketProvider, name, token: '' })
  provider.attach()
  return provider
}
const title = open(`${documentName}/title`)
const body = open(documentName)
ofHocuspocus(body)

const field = document.createElement('input')
field.ariaLabel = 'Title'
document.getElementById('editor').before(field)
const properties = title.document.getMap('properties')
properties.observe(() => { field.value = properties.get('title') ?? '' })
field.addEventListener('input', () => properties.set('title', field.value))

const editor = new Editor({
  element: document.getElementById('editor'),
  extensions: [
    // The history is the shared one.
    StarterKit.configure({ undoRedo: false }),
    Collaboration.configure({ document: body.document }),
    CollaborationCaret.configure({ provider: body, user: { name: 'Tiptap', color: '#8a4b08' } })
  ]
})
editor.commands.focus()
