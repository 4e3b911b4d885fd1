// One WebSocket that reconnects by itself. It sends a hello with the key, passes on the server's messages, and after a
// lost connection tries again with growing delays.

import { decodeFrame, encodeFrame } from "./frames.js";

const PROTOCOL = 1;
const FIRST_DELAY_MS = 250;
const LONGEST_DELAY_MS = 8000;
const KEY_REFUSED = 4401; // close code

/**
 * onState(state): "connecting", "open" (the server still has to welcome us), "waiting" (lost, trying again),
 * "refused" (no key or a wrong one; call `unlock`).
 * onMessage(header, body): every frame.
 */
export class Connection {
  #url;
  #onState;
  #onMessage;
  #socket = null;
  #key = sessionStorage.getItem("key");
  #failures = 0;
  #timer = 0;

  constructor(url, { onState, onMessage }) {
    this.#url = url;
    this.#onState = onState;
    this.#onMessage = onMessage;
    addEventListener("online", () => this.#hurry());
    document.addEventListener("visibilitychange", () => document.hidden || this.#hurry());
    this.connect();
  }

  /** Whether a key was sent; after "refused" it tells a missing key from a wrong one. */
  get hasKey() {
    return this.#key !== null;
  }

  /** Try now. */
  connect() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    this.#onState("connecting");
    const socket = new WebSocket(this.#url);
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      this.#onState("open");
      this.send({ type: "hello", protocol: PROTOCOL, key: this.#key });
    };
    socket.onmessage = ({ data }) => {
      const { header, body } = decodeFrame(data);
      if (header.type === "welcome") this.#failures = 0;
      this.#onMessage(header, body);
    };
    socket.onclose = ({ code }) => this.#lost(code);
    this.#socket = socket;
  }

  /** Send a frame; silently nothing while there is no connection, whose loss is told by onState. */
  send(header, body) {
    if (this.#socket.readyState === WebSocket.OPEN) this.#socket.send(encodeFrame(header, body));
  }

  /** Try again with a key, which lives as long as the tab. */
  unlock(key) {
    this.#key = key;
    sessionStorage.setItem("key", key);
    this.connect();
  }

  #lost(code) {
    if (code === KEY_REFUSED) {
      this.#onState("refused");
      return;
    }
    const delay = Math.min(LONGEST_DELAY_MS, FIRST_DELAY_MS * 2 ** this.#failures++);
    this.#timer = setTimeout(() => this.connect(), delay * (0.75 + Math.random() / 2)); // pages do not come all at once
    this.#onState("waiting");
  }

  #hurry() {
    if (this.#timer) this.connect();
  }
}
