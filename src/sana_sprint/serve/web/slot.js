// Latest wins: at most one request is in flight, and the next one is built from the page's state at that time. Nothing is
// queued, so fast input cannot get ahead of a slow model by more than one picture.

const PATIENCE_MS = 2000; // a picture that takes longer is given up once the input has changed

/**
 * send(sequence) puts the page's present state on the wire; cancel(sequence) gives a request up, and the server
 * answers that too.
 */
export class Slot {
  #send;
  #cancel;
  #open = false;
  #sequence = 0;
  #inFlight = null; // {sequence, changedAt, sentAt}
  #changedAt = 0;
  #isReady = false; // there is a change to send
  #timer = 0;
  #patience = 0;

  constructor({ send, cancel }) {
    this.#send = send;
    this.#cancel = cancel;
  }

  /** The input has changed. It goes out after `delay` ms without another change. */
  change(delay = 0) {
    this.withdraw();
    this.#changedAt = performance.now();
    if (delay > 0) this.#timer = setTimeout(() => this.#ready(), delay);
    else this.#ready();
  }

  /** There is nothing to draw after all. */
  withdraw() {
    this.#isReady = false;
    clearTimeout(this.#timer);
    this.#timer = 0;
  }

  /** Whether the last answer belongs to the last input. */
  get isIdle() {
    return !this.#inFlight && !this.#isReady && !this.#timer;
  }

  /** There is a connection; what is wanted goes out at once. */
  open() {
    this.#open = true;
    this.#pump();
  }

  /** The connection is gone, and with it what was in flight: that is to be asked for again. */
  close() {
    this.#open = false;
    if (this.#inFlight) this.#isReady = true;
    this.#land();
  }

  /**
   * An answer has come. Returns when the input it belongs to changed (performance.now()), or null if nobody waits
   * for this answer.
   */
  settle(sequence) {
    if (this.#inFlight?.sequence !== sequence) return null;
    const { changedAt } = this.#inFlight;
    this.#land();
    this.#pump();
    return changedAt;
  }

  /** The request could not be served now: ask again after `delay` ms, or with the next change. */
  retry(sequence, delay) {
    if (this.#inFlight?.sequence !== sequence) return;
    this.#land();
    this.withdraw();
    this.#timer = setTimeout(() => this.#ready(), delay);
  }

  #ready() {
    this.#timer = 0;
    this.#isReady = true;
    queueMicrotask(() => this.#pump()); // changes made together are one
  }

  #land() {
    clearTimeout(this.#patience);
    this.#inFlight = null;
  }

  #pump() {
    if (!this.#open || !this.#isReady) return;
    if (this.#inFlight) {
      this.#giveUpLate();
      return;
    }
    this.#isReady = false;
    this.#inFlight = { sequence: ++this.#sequence, changedAt: this.#changedAt, sentAt: performance.now() };
    this.#send(this.#sequence);
  }

  #giveUpLate() {
    const { sequence, sentAt } = this.#inFlight;
    clearTimeout(this.#patience);
    const left = Math.max(0, sentAt + PATIENCE_MS - performance.now());
    this.#patience = setTimeout(() => this.#cancel(sequence), left);
  }
}
