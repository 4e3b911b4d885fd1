// The page's settings: one plain object, kept across reloads. Listeners are called on changes.

const STORAGE_KEY = "sana-sprint";

const DEFAULTS = {
  prompt: "",
  seed: 7,
  isLocked: true,
  steps: 2,
  guidance: 4.5,
  strength: 1,
  kind: "",
  size: "", // "WIDTHxHEIGHT"; empty until the server has sent its model's size
  isCrisp: false,
  lineWidth: 6,
  theme: "auto",
  hasShortcuts: true,
};

/** Settings that a picture depends on. */
export const DRAWN = ["prompt", "seed", "steps", "guidance", "strength", "kind", "size"];

export class State {
  #values = { ...DEFAULTS, ...stored() };
  #listeners = [];

  get values() {
    return this.#values;
  }

  /** Change some settings. Listeners get the names of those that differ from before. */
  set(changes) {
    const names = Object.keys(changes).filter((name) => changes[name] !== this.#values[name]);
    if (names.length === 0) return;
    this.#values = { ...this.#values, ...changes };
    localStorage.setItem(STORAGE_KEY, JSON.stringify(this.#values));
    for (const listener of this.#listeners) listener(this.#values, new Set(names));
  }

  /** listener(values, names) is called after each change. */
  listen(listener) {
    this.#listeners.push(listener);
  }
}

/** The stored settings that still exist and have the same type. */
function stored() {
  try {
    const kept = Object.entries(JSON.parse(localStorage.getItem(STORAGE_KEY)) ?? {});
    return Object.fromEntries(kept.filter(([name, value]) => typeof value === typeof DEFAULTS[name]));
  } catch {
    return {}; // not JSON: written by another page, or truncated
  }
}

/** A seed drawn at random; as many as fit into 32 bits. */
export function randomSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0];
}
