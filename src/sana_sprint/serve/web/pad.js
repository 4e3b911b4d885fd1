// Input for the sketch: mouse, touch, pen and arrow keys become strokes.

const STEP = 0.02; // of the width, per arrow key
const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const UNIT = 0.005; // of the width, per unit of line width

export class Pad {
  #canvas;
  #sketch;
  #lineWidth;
  #pointer = null; // the one that draws
  #cursor = null; // [x, y] of the keyboard's pen, once it was used
  #isDown = false; // the keyboard's pen
  #stroke = null; // the last one
  #isPainting = false;

  /** Whether strokes are ink; if not, they erase. */
  hasInk = true;

  /** lineWidth(): the width in units of the slider. */
  constructor(canvas, sketch, lineWidth) {
    this.#canvas = canvas;
    this.#sketch = sketch;
    this.#lineWidth = lineWidth;
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => (this.#pointer = null));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("blur", () => this.#lift());
    sketch.addEventListener("change", () => this.#repaint());
    this.#repaint();
  }

  /** Give the paper the shape of the picture. */
  fit(width, height) {
    this.#canvas.width = 512;
    this.#canvas.height = Math.round((512 * height) / width);
    this.#repaint();
  }

  #down(event) {
    if (this.#pointer !== null || event.button !== 0) return;
    this.#pointer = event.pointerId;
    this.#cursor = null;
    this.#canvas.setPointerCapture(event.pointerId);
    this.#begin(this.#point(event));
  }

  #move(event) {
    if (event.pointerId !== this.#pointer) return;
    const events = event.getCoalescedEvents?.() ?? [];
    this.#sketch.extend(this.#stroke, (events.length > 0 ? events : [event]).map((one) => this.#point(one)));
  }

  #key(event) {
    if (event.key === " ") {
      this.#isDown = !this.#isDown;
      this.#cursor ??= [0.5, (0.5 * this.#canvas.height) / this.#canvas.width];
      if (this.#isDown) this.#begin([...this.#cursor]);
    } else if (event.key in MOVES) {
      const bottom = this.#canvas.height / this.#canvas.width;
      const [x, y] = this.#cursor ?? [0.5, bottom / 2];
      const [dx, dy] = MOVES[event.key];
      this.#cursor = [clamp(x + dx * STEP, 1), clamp(y + dy * STEP, bottom)];
      if (this.#isDown) this.#sketch.extend(this.#stroke, [[...this.#cursor]]);
    } else return;
    event.preventDefault(); // the page would scroll
    this.#repaint();
  }

  #lift() {
    this.#isDown = false;
    this.#cursor = null;
    this.#repaint();
  }

  #begin(point) {
    this.#stroke = this.#sketch.begin(point, this.#lineWidth() * UNIT, this.hasInk);
  }

  #point(event) {
    const box = this.#canvas.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.width];
  }

  /** Once per frame, however many changes there were. */
  #repaint() {
    if (this.#isPainting) return;
    this.#isPainting = true;
    requestAnimationFrame(() => {
      this.#isPainting = false;
      this.#sketch.paint(this.#canvas);
      if (this.#cursor) this.#paintCursor();
    });
  }

  #paintCursor() {
    const context = this.#canvas.getContext("2d");
    const [x, y] = this.#cursor.map((share) => share * this.#canvas.width);
    context.beginPath();
    context.arc(x, y, 8, 0, 2 * Math.PI);
    context.strokeStyle = this.#isDown ? "#c2512c" : "#888";
    context.lineWidth = 3;
    context.stroke();
  }
}

function clamp(value, most) {
  return Math.min(most, Math.max(0, value));
}
