// What the page says about itself, in words: the state of the connection, notices, and to those who listen instead of
// looking the picture that stays. Nothing here speaks with every frame.

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

  /** A sentence that stays until `clear`; perhaps with something to do about it: {label, act}. */
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

  /** Tell a screen reader, when it has finished what it is saying. */
  announce(text) {
    this.#announcer.textContent = text;
  }
}
