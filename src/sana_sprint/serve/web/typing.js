// When a change of the prompt is worth a picture: at the end of a word at once, within a word once the hand rests.

const PAUSE_MS = 50; // keys of one burst are closer together; a slower hand sees half words, and loses nothing

/** Milliseconds to wait after this input event. */
export function typingDelay({ inputType, target }) {
  const isLetter = inputType === "insertText" && /[\p{L}\p{N}]$/u.test(target.value.slice(0, target.selectionEnd));
  return isLetter || inputType?.startsWith("delete") ? PAUSE_MS : 0;
}
