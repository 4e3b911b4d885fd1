// Single-key shortcuts, active when the cursor is not in a field.

const byId = (id) => document.getElementById(id);
const press = (id) => () => byId(id).click();

const KEYS = {
  "/": () => byId("prompt").focus(),
  "?": press("help"),
  d: press("dice"),
  l: press("lock"),
  r: press("roll"),
  s: press("download"),
  p: press("crisp"),
  t: press("theme"),
  b: press("brush"),
  e: press("eraser"),
  x: press("clear"),
};

/** Listen to keys. They can be switched off, because they interfere with speech input. */
export function bindShortcuts(state) {
  addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]") || event.isComposing) return;
    const isTyping = event.target.matches("textarea, select, input:not([type=range], [type=radio])");
    if (event.key === "Escape" && isTyping) event.target.blur();
    if (isTyping || event.altKey) return;
    if (event.ctrlKey || event.metaKey) withControl(event);
    else if (state.values.hasShortcuts) single(event, state);
  });
}

function withControl(event) {
  const key = event.key.toLowerCase();
  const target = key === "y" || (key === "z" && event.shiftKey) ? "redo" : key === "z" ? "undo" : null;
  if (!target) return;
  event.preventDefault();
  byId(target).click();
}

function single(event, state) {
  if (/^[1-4]$/.test(event.key)) {
    const radio = document.querySelector(`[name=steps][value="${event.key}"]`);
    if (!radio.disabled) state.set({ steps: Number(event.key) });
  } else if (event.key === "[" || event.key === "]") {
    const { lineWidth } = state.values;
    state.set({ lineWidth: Math.min(20, Math.max(1, lineWidth + (event.key === "]" ? 1 : -1))) });
  } else if (Object.hasOwn(KEYS, event.key.toLowerCase())) {
    event.preventDefault(); // "/" would open the browser's own search
    KEYS[event.key.toLowerCase()]();
  }
}
