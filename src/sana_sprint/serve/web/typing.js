// When to draw while the user types: at once at the end of a word, within a word after a pause.

const PAUSE_MS = 50; // keys of one burst are closer together; a slower hand sees half words, and loses nothing

/** Milliseconds to wait after this input event. */
export function typingDelay({ inputType, target }) {
  const isLetter = inputType === "insertText" && /[\p{L}\p{N}]$/u.test(target.value.slice(0, target.selectionEnd));
  return isLetter || inputType?.startsWith("delete") ? PAUSE_MS : 0;
}
