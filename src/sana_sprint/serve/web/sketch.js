// The sketch as a list of actions: strokes, inserted pictures, clears. Undo removes the last one.
// Lengths are shares of the width, so the same sketch can be shown large and sent small.

const PAPER = "white";
const INK = "black";

/**
 * What is in the list:
 * {kind: "stroke", ink: bool, width, points: [[x, y], ...]}: ink or, if not, paper again;
 * {kind: "picture", blob}; {kind: "clear"}.
 */
export class Sketch extends EventTarget {
  #done = [];
  #undone = [];
  #bitmaps = new WeakMap(); // of the blobs

  /** Whether there is nothing on the paper. */
  get isEmpty() {
    return this.#done.length === 0 || this.#done.at(-1).kind === "clear";
  }

  get canUndo() {
    return this.#done.length > 0;
  }

  get canRedo() {
    return this.#undone.length > 0;
  }

  /** The list, to keep; `prepare` and `load` take it back. */
  get actions() {
    return structuredClone(this.#done);
  }

  /** Begin a stroke at a point, and return it. */
  begin(point, width, ink) {
    const stroke = { kind: "stroke", ink, width, points: [point] };
    this.#do(stroke);
    return stroke;
  }

  /** Go on with a stroke. */
  extend(stroke, points) {
    stroke.points.push(...points);
    this.#changed();
  }

  /** Put a picture onto the paper. Rejects if the blob is none. */
  async insert(blob) {
    await this.#decode(blob);
    this.#do({ kind: "picture", blob });
  }

  clear() {
    if (!this.isEmpty) this.#do({ kind: "clear" });
  }

  undo() {
    if (!this.canUndo) return;
    this.#undone.push(this.#done.pop());
    this.#changed();
  }

  redo() {
    if (!this.canRedo) return;
    this.#done.push(this.#undone.pop());
    this.#changed();
  }

  /** Make a list that `actions` gave ready for `load`. */
  async prepare(actions) {
    for (const { kind, blob } of actions) if (kind === "picture") await this.#decode(blob);
  }

  /** Replace everything by a list that is prepared. */
  load(actions) {
    this.#done = [...actions];
    this.#undone = [];
    this.#changed();
  }

  /** Draw the sketch so that it fills a canvas. */
  paint(canvas) {
    const context = canvas.getContext("2d");
    context.fillStyle = PAPER;
    context.fillRect(0, 0, canvas.width, canvas.height);
    const start = this.#done.findLastIndex(({ kind }) => kind === "clear") + 1;
    for (const action of this.#done.slice(start)) {
      if (action.kind === "stroke") paintStroke(context, action);
      else paintCovering(context, this.#bitmaps.get(action.blob));
    }
  }

  async #decode(blob) {
    this.#bitmaps.set(blob, await createImageBitmap(blob));
  }

  #do(action) {
    this.#done.push(action);
    this.#undone = [];
    this.#changed();
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}

function paintStroke(context, { ink, width, points }) {
  const scale = context.canvas.width;
  context.strokeStyle = context.fillStyle = ink ? INK : PAPER;
  context.lineWidth = width * scale;
  context.lineCap = context.lineJoin = "round";
  const [start, ...rest] = points.map((point) => point.map((share) => share * scale));
  context.beginPath();
  context.moveTo(...start);
  for (const point of rest) context.lineTo(...point);
  context.stroke();
  context.beginPath(); // a line without length, of a pen that only touched the paper, would leave no trace
  context.arc(...start, context.lineWidth / 2, 0, 2 * Math.PI);
  context.fill();
}

/** Scaled to cover the paper, centred. */
function paintCovering(context, bitmap) {
  const { width, height } = context.canvas;
  const scale = Math.max(width / bitmap.width, height / bitmap.height);
  const [w, h] = [bitmap.width * scale, bitmap.height * scale];
  context.drawImage(bitmap, (width - w) / 2, (height - h) / 2, w, h);
}
