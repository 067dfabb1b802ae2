/** The text on the page: Quill, bound to the shared text and to the others' cursors. */
import Quill from 'quill'
import QuillCursors from 'quill-cursors'
import { QuillBinding } from 'y-quill'

Quill.register('modules/cursors', QuillCursors)

/**
 * Shows the session's text in `container` and takes edits from there.
 * @param {{ container: HTMLElement, toolbar: HTMLElement, session: import('./session.js').Session }} parts
 */
export const bindEditor = ({ container, toolbar, session }) => {
  const quill = new Quill(container, {
    theme: 'snow',
    placeholder: 'Write something. Everybody with this address sees it at once.',
    modules: {
      toolbar: { container: toolbar },
      cursors: { hideDelayMs: 2500, hideSpeedMs: 300 },
      // Undo takes back what we typed, never what others did.
      history: { userOnly: true },
      keyboard: {
        bindings: {
          // Tab writes a tab, so there must be another way out by keyboard.
          leave: { key: 'Escape', handler: () => toolbar.querySelector('button').focus() }
        }
      }
    }
  })
  quill.root.setAttribute('role', 'textbox')
  quill.root.setAttribute('aria-multiline', 'true')
  quill.root.setAttribute('aria-label', 'Text of the document')
  quill.root.setAttribute('aria-description', 'Press Escape to reach the toolbar')
  // A cursor keeps the name and colour it was made with. The session hears of changes before the
  // binding does, which then makes the cursor anew.
  const known = new Map()
  session.on('people', people => {
    for (const { id, name, color } of people) {
      const looks = `${color} ${name}`
      if (known.get(id) !== looks) quill.getModule('cursors').removeCursor(String(id))
      known.set(id, looks)
    }
  })
  const binding = new QuillBinding(session.text, quill, session.awareness)
  return {
    /** @param {boolean} on whether the user may write */
    enable: on => quill.enable(on),
    focus: () => quill.focus(),
    /** The text without its formats. */
    text: () => quill.getText(),
    destroy: () => binding.destroy()
  }
}
