// The page, put together: a change of the state or the sketch goes through the slot to the server, and its picture
// comes back.

import { Connection } from "./connection.js";
import { bindControls, offer } from "./controls.js";
import { examplesFor, showExamples } from "./examples.js";
import { bindFiles, save } from "./files.js";
import { History } from "./history.js";
import { Meter } from "./meter.js";
import { Pad } from "./pad.js";
import { Picture } from "./picture.js";
import { isPng, readTexts, writeTexts } from "./png.js";
import { bindShortcuts } from "./shortcuts.js";
import { Sketch } from "./sketch.js";
import { Slot } from "./slot.js";
import { DRAWN, State, randomSeed } from "./state.js";
import { Status } from "./status.js";
import { bindTheme } from "./theme.js";
import { typingDelay } from "./typing.js";

const REST_MS = 1200; // a picture that stays so long is kept in the history, and announced
const EXACT_PIXELS = 256 ** 2; // up to here pictures are sent without loss: it costs next to nothing
const SETTINGS = "sana_sprint"; // the text in a PNG file that holds its settings

const byId = (id) => document.getElementById(id);

const state = new State();
const sketch = new Sketch();
const pad = new Pad(byId("pad"), sketch, () => state.values.lineWidth);
const picture = new Picture(byId("picture"));
const meter = new Meter({ p50: byId("p50"), p95: byId("p95"), rate: byId("rate") });
const status = new Status({
  connection: byId("connection"),
  notice: byId("notice"),
  text: byId("notice-text"),
  action: byId("notice-action"),
  announcer: byId("announcer"),
});
const history = new History(byId("history"), {
  onRestore: restore,
  onCount: (count) => {
    byId("history-empty").hidden = count > 0;
    byId("forget").hidden = count === 0;
  },
});
const slot = new Slot({ send, cancel: (sequence) => connection.send({ type: "cancel", sequence }) });
const connection = new Connection(new URL("realtime", document.baseURI).href.replace(/^http/, "ws"), {
  onState,
  onMessage: (header, body) => ON_MESSAGE[header.type](header, body),
});

let shown = null; // what is on screen: {texts, blob}
let welcome = null; // what the server said of its model
let delay = 0; // of the change that is being made
let restTimer = 0;
let isRolling = false;

// ----- to the server --------------------------------------------------------------------------------------------------

/** Handle a change of anything that the picture depends on. */
function changed() {
  clearTimeout(restTimer);
  if (state.values.prompt.trim() === "") slot.withdraw();
  else slot.change(delay);
}

async function send(sequence) {
  const { prompt, seed, steps, guidance, strength, kind, size } = state.values;
  const body = await exportSketch(size);
  const [width, height] = sides(size);
  connection.send(
    {
      type: "draw",
      sequence,
      prompt,
      seed,
      steps,
      size,
      output_format: width * height <= EXACT_PIXELS ? "png" : "jpeg",
      ...(welcome.has_guidance && { guidance_scale: guidance }),
      ...(body && { control_kind: kind, control_scale: strength }),
    },
    body,
  );
}

/** The sketch as a PNG file's bytes; undefined if it is empty or the model cannot use one. */
async function exportSketch(size) {
  if (sketch.isEmpty || welcome.control_kinds.length === 0) return undefined;
  const [width, height] = sides(size);
  const canvas = new OffscreenCanvas(width, height);
  sketch.paint(canvas);
  const pixels = new Uint32Array(canvas.getContext("2d").getImageData(0, 0, width, height).data.buffer);
  if (pixels.every((pixel) => pixel === pixels[0])) return undefined;
  return new Uint8Array(await (await canvas.convertToBlob()).arrayBuffer());
}

function sides(size) {
  return size.split("x").map(Number);
}

// ----- from the server ------------------------------------------------------------------------------------------------

const ON_MESSAGE = { loading, welcome: onWelcome, picture: onPicture, dropped, error: onError };

function onState(connectionState) {
  status.connection(connectionState);
  if (connectionState === "open") return;
  slot.close();
  if (connectionState === "waiting") {
    status.notice("The server is gone. This page tries again by itself, and nothing is lost.", {
      label: "Try now",
      act: () => connection.connect(),
    });
  }
  if (connectionState === "refused") {
    byId("key-wrong").hidden = !connection.hasKey;
    const ask = () => byId("key-dialog").showModal();
    status.notice("This server needs a key.", { label: "Enter the key", act: ask });
    ask();
  }
}

function loading() {
  status.connection("loading");
  status.notice("The server is loading its model; the first picture comes in a moment.");
}

async function onWelcome(header) {
  const isFirst = welcome === null;
  welcome = header;
  byId("model").textContent = header.model;
  status.clear();
  status.connection("live");
  offer(state, header);
  slot.open();
  if (!isFirst) return;
  changed();
  const examples = await examplesFor(header.model);
  showExamples(byId("examples"), examples, (settings) => state.set(settings));
  const { prompt, seed, steps } = examples[0];
  if (state.values.prompt === "") state.set({ prompt, seed, steps });
}

async function onPicture({ sequence, format, texts, lost_prompt_tokens: lost, untaught_words: untaught }, body) {
  const changedAt = slot.settle(sequence);
  if (changedAt === null) return; // stale
  status.connection("live");
  if (lost > 0) status.notice(`The prompt is too long: its last ${lost} tokens were not used.`);
  else if (untaught.length > 0) status.notice(`The model was not taught: ${untaught.join(", ")}.`);
  else status.clear();
  const entry = { texts, blob: new Blob([body], { type: `image/${format}` }) };
  const { prompt } = JSON.parse(texts[SETTINGS]);
  if (!(await picture.show(sequence, entry.blob, prompt))) return;
  shown = entry;
  byId("download").disabled = false;
  meter.picture(changedAt);
  if (isRolling && !document.hidden) state.set({ seed: randomSeed() });
  else rest();
}

function dropped({ sequence }) {
  slot.settle(sequence);
}

function onError({ sequence, error, retry_after: retryAfter }) {
  if (retryAfter === null) {
    if (slot.settle(sequence) !== null) status.notice(`${error.message[0].toUpperCase()}${error.message.slice(1)}.`);
    return;
  }
  status.connection("busy");
  status.notice(`The server is busy. Trying again in ${retryAfter} s.`);
  slot.retry(sequence, 1000 * retryAfter);
}

/** Keep the picture once nothing has changed for a while. */
function rest() {
  clearTimeout(restTimer);
  restTimer = setTimeout(() => {
    if (!slot.isIdle) return; // a newer picture is on its way
    history.add({ ...shown, sketch: sketch.actions });
    status.announce(`Picture of ${state.values.prompt}`);
  }, REST_MS);
}

// ----- from the user --------------------------------------------------------------------------------------------------

/** Restore the settings of a picture, and its sketch if it has one. */
async function restore({ texts, sketch: actions = [] }) {
  const kept = JSON.parse(texts[SETTINGS]);
  await sketch.prepare(actions);
  sketch.load(actions);
  state.set({
    prompt: String(kept.prompt ?? ""),
    ...(Number.isSafeInteger(kept.seed) && { seed: kept.seed }),
    ...(kept.num_inference_steps <= 4 && { steps: kept.num_inference_steps }),
    ...(Number.isFinite(kept.guidance_scale) && { guidance: kept.guidance_scale }),
    ...(Number.isFinite(kept.controlnet_conditioning_scale) && { strength: kept.controlnet_conditioning_scale }),
    ...(hasOption("kind", kept.kind) && { kind: kept.kind }),
    ...(hasOption("size", `${kept.width}x${kept.height}`) && { size: `${kept.width}x${kept.height}` }),
  });
}

function hasOption(id, wanted) {
  return [...byId(id).options].some(({ value }) => value === wanted);
}

/** A file with our settings inside restores them; any other picture goes onto the sketch. */
async function onFile(file) {
  const texts = readTexts(new Uint8Array(await file.arrayBuffer()));
  try {
    if (texts[SETTINGS]) await restore({ texts });
    else if (welcome?.control_kinds.length) await sketch.insert(file);
    else status.notice("That picture contains no settings, and this model cannot follow a picture.");
  } catch {
    status.notice("That file could not be read as a picture.");
  }
}

async function download() {
  const { blob, texts } = shown;
  const { prompt, seed } = JSON.parse(texts[SETTINGS]);
  const name = `${prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu)?.join("-").slice(0, 60) ?? "picture"}-${seed}.png`;
  const bytes = new Uint8Array(await blob.arrayBuffer());
  save(isPng(bytes) ? blob : await asPng(blob, texts), name);
}

async function asPng(blob, texts) {
  const bitmap = await createImageBitmap(blob);
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  const png = await canvas.convertToBlob({ type: "image/png" });
  return writeTexts(new Uint8Array(await png.arrayBuffer()), texts);
}

/** Draw now; with new noise if the seed is not locked. */
function drawNow() {
  if (state.values.isLocked) changed();
  else state.set({ seed: randomSeed() });
}

function roll(isOn) {
  isRolling = isOn;
  byId("roll").setAttribute("aria-pressed", isOn);
  if (isOn) state.set({ seed: randomSeed() });
}

function useInk(hasInk) {
  pad.hasInk = hasInk;
  byId("brush").setAttribute("aria-pressed", hasInk);
  byId("eraser").setAttribute("aria-pressed", !hasInk);
}

function sketchChanged() {
  byId("undo").disabled = !sketch.canUndo;
  byId("redo").disabled = !sketch.canRedo;
  byId("clear").disabled = sketch.isEmpty;
  byId("pad-hint").hidden = !sketch.isEmpty;
  changed();
}

byId("prompt").addEventListener("input", (event) => {
  delay = typingDelay(event);
  state.set({ prompt: event.target.value, ...(!state.values.isLocked && { seed: randomSeed() }) });
  delay = 0;
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.isComposing) return;
  event.preventDefault(); // a prompt has one line
  drawNow();
});
byId("download").addEventListener("click", download);
byId("roll").addEventListener("click", () => roll(!isRolling));
byId("forget").addEventListener("click", () => history.clear());
byId("brush").addEventListener("click", () => useInk(true));
byId("eraser").addEventListener("click", () => useInk(false));
byId("undo").addEventListener("click", () => sketch.undo());
byId("redo").addEventListener("click", () => sketch.redo());
byId("clear").addEventListener("click", () => sketch.clear());
byId("help").addEventListener("click", () => byId("help-dialog").showModal());
byId("open-file").addEventListener("click", () => byId("file").click());
byId("key-form").addEventListener("submit", () => connection.unlock(byId("key").value));
sketch.addEventListener("change", sketchChanged);
document.addEventListener("visibilitychange", () => {
  if (isRolling && !document.hidden) roll(true); // it pauses while nobody looks
});

state.listen((values, names) => {
  if (names.has("size")) pad.fit(...sides(values.size));
  if (DRAWN.some((name) => names.has(name))) changed();
});
bindControls(state);
bindTheme(state, byId("theme"));
bindShortcuts(state);
bindFiles(byId("file"), onFile);
if (state.values.size) pad.fit(...sides(state.values.size));
