// Status in words: the state of the connection, notices, and announcements to screen readers of pictures that stay.
// Nothing here is announced for every frame.

const CONNECTION = {
  connecting: "Connecting",
  open: "Connecting",
  waiting: "Reconnecting",
  refused: "Locked",
  loading: "Loading the model",
  live: "Live",
  busy: "Busy",
};

export class Status {
  #connection;
  #notice;
  #text;
  #action;
  #announcer;

  constructor({ connection, notice, text, action, announcer }) {
    this.#connection = connection;
    this.#notice = notice;
    this.#text = text;
    this.#action = action;
    this.#announcer = announcer;
  }

  /** One of the names in CONNECTION. */
  connection(state) {
    if (this.#connection.dataset.state === state) return;
    this.#connection.dataset.state = state;
    this.#connection.textContent = CONNECTION[state];
  }

  /** Show a sentence until `clear`, optionally with a button: {label, act}. */
  notice(text, remedy) {
    if (this.#text.textContent !== text) this.#text.textContent = text;
    this.#action.hidden = !remedy;
    if (remedy) {
      this.#action.textContent = remedy.label;
      this.#action.onclick = remedy.act;
    }
    this.#notice.hidden = false;
  }

  clear() {
    this.#notice.hidden = true;
    this.#text.textContent = "";
  }

  /** Announce text to a screen reader, after its current announcement. */
  announce(text) {
    this.#announcer.textContent = text;
  }
}
