// The picture on screen. A new one replaces the old in one go, without a blank or a fade between them; one that was
// decoded too late, after a newer one, is dropped.

export class Picture {
  #canvas;
  #context;
  #newest = 0;

  constructor(canvas) {
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d");
  }

  /**
   * Show picture number `sequence`. Resolves to whether it was shown, once it is drawn.
   * The canvas tells its number in data-sequence, and what it is to those who cannot see it.
   */
  async show(sequence, blob, description) {
    const bitmap = await createImageBitmap(blob);
    if (sequence < this.#newest) return false;
    this.#newest = sequence;
    const canvas = this.#canvas;
    if (canvas.width !== bitmap.width || canvas.height !== bitmap.height) {
      canvas.width = bitmap.width;
      canvas.height = bitmap.height;
    }
    this.#context.drawImage(bitmap, 0, 0);
    bitmap.close();
    canvas.dataset.sequence = sequence;
    canvas.setAttribute("aria-label", description);
    return true;
  }
}
