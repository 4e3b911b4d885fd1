// The form and the state, bound both ways.

import { randomSeed } from "./state.js";

const MAX_SEED = 2 ** 32 - 1;
const ASPECTS = [
  ["Square", 1, 1],
  ["Landscape 4:3", 4, 3],
  ["Portrait 3:4", 3, 4],
  ["Wide 16:9", 16, 9],
  ["Tall 9:16", 9, 16],
];

const byId = (id) => document.getElementById(id);

/** Connect every control with the setting it shows; only what the prompt's keys do is decided elsewhere. */
export function bindControls(state) {
  for (const radio of document.getElementsByName("steps")) {
    radio.addEventListener("change", () => state.set({ steps: Number(radio.value) }));
  }
  bindNumber(state, "guidance");
  bindNumber(state, "strength");
  bindNumber(state, "line-width", "lineWidth");
  byId("seed").addEventListener("change", ({ target }) => state.set({ seed: asSeed(target.value) }));
  byId("dice").addEventListener("click", () => state.set({ seed: randomSeed() }));
  bindToggle(state, "lock", "isLocked");
  bindToggle(state, "crisp", "isCrisp");
  byId("shortcuts").addEventListener("change", ({ target }) => state.set({ hasShortcuts: target.checked }));
  for (const name of ["size", "kind"]) {
    byId(name).addEventListener("change", ({ target }) => state.set({ [name]: target.value }));
  }
  state.listen((values) => showValues(values));
  showValues(state.values);
  addEventListener("resize", () => growPrompt(byId("prompt")));
}

/** Offer what the server's model can do. */
export function offer(state, { native, max_pixels, max_steps, has_guidance, control_kinds, control_labels }) {
  const sizes = ASPECTS.map(([name, w, h]) => [name, ...sides(native, w / h)]);
  const offered = sizes.filter(([, width, height]) => width * height <= max_pixels);
  byId("size").replaceChildren(
    ...offered.map(([name, w, h]) => new Option(`${name}, ${w} × ${h}`, `${w}x${h}`)),
  );
  byId("kind").replaceChildren(...control_kinds.map((kind) => new Option(control_labels[kind] ?? kind, kind)));
  for (const radio of document.getElementsByName("steps")) radio.disabled = Number(radio.value) > max_steps;
  byId("guidance-field").hidden = !has_guidance;
  byId("strength-field").hidden = byId("sketch").hidden = control_kinds.length === 0;
  byId("no-control").hidden = control_kinds.length > 0;
  byId("kind-field").hidden = control_kinds.length < 2;
  document.body.classList.toggle("with-sketch", control_kinds.length > 0);
  const isOffered = offered.some(([, w, h]) => `${w}x${h}` === state.values.size);
  state.set({
    size: isOffered ? state.values.size : `${native}x${native}`,
    kind: control_kinds.includes(state.values.kind) ? state.values.kind : (control_kinds[0] ?? ""),
    steps: Math.min(state.values.steps, max_steps),
  });
  showValues(state.values);
}

/** Sides with about as many pixels as the native square, multiples of an eighth of its side or 32. */
function sides(native, aspect) {
  const unit = Math.min(32, native / 8);
  const round = (side) => Math.round(side / unit) * unit;
  return [round(native * Math.sqrt(aspect)), round(native / Math.sqrt(aspect))];
}

function bindNumber(state, id, name = id) {
  byId(id).addEventListener("input", ({ target }) => state.set({ [name]: Number(target.value) }));
}

function bindToggle(state, id, name) {
  byId(id).addEventListener("click", () => state.set({ [name]: !state.values[name] }));
}

function showValues(values) {
  const prompt = byId("prompt");
  if (prompt.value !== values.prompt) prompt.value = values.prompt; // setting it would move the cursor
  growPrompt(prompt);
  for (const radio of document.getElementsByName("steps")) radio.checked = Number(radio.value) === values.steps;
  for (const [id, name] of [["guidance", "guidance"], ["strength", "strength"], ["line-width", "lineWidth"], ["seed", "seed"]]) {
    byId(id).value = values[name];
  }
  byId("guidance-value").textContent = values.guidance.toFixed(1);
  byId("strength-value").textContent = values.strength.toFixed(2);
  byId("size").value = values.size;
  byId("kind").value = values.kind;
  byId("lock").setAttribute("aria-pressed", values.isLocked);
  byId("crisp").setAttribute("aria-pressed", values.isCrisp);
  byId("picture").classList.toggle("crisp", values.isCrisp);
  byId("shortcuts").checked = values.hasShortcuts;
}

/** As high as its text. */
function growPrompt(prompt) {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

function asSeed(text) {
  const seed = Math.round(Number(text));
  return Number.isFinite(seed) ? Math.min(MAX_SEED, Math.max(0, seed)) : 0;
}
