// The strip of pictures that the user paused on, newest first, kept in the browser's database.

const DATABASE = "sana-sprint";
const STORE = "pictures";
const KEPT = 60;

/** onRestore(entry) is called when one is chosen. An entry is {texts, blob, sketch}; the database adds {id}. */
export class History {
  #list;
  #onRestore;
  #onCount;
  #database;

  constructor(list, { onRestore, onCount }) {
    this.#list = list;
    this.#onRestore = onRestore;
    this.#onCount = onCount;
    this.#database = openDatabase();
    this.#load();
  }

  /** Put a picture first, unless the first one was made the same way. */
  async add(entry) {
    if (this.#list.firstElementChild?.dataset.settings === entry.texts.sana_sprint) return;
    const item = this.#show(entry);
    this.#list.prepend(item);
    const id = await request(this.#database, "readwrite", (store) => store.add(entry));
    if (id !== undefined) item.dataset.id = id;
    while (this.#list.children.length > KEPT) this.#remove(this.#list.lastElementChild);
  }

  /** Delete all pictures. */
  clear() {
    for (const item of [...this.#list.children]) this.#remove(item);
  }

  async #load() {
    const entries = (await request(this.#database, "readonly", (store) => store.getAll())) ?? [];
    for (const entry of entries.reverse()) this.#list.append(this.#show(entry));
    this.#onCount(this.#list.children.length);
  }

  #show(entry) {
    const { prompt, seed } = JSON.parse(entry.texts.sana_sprint);
    const image = Object.assign(new Image(), { src: URL.createObjectURL(entry.blob), alt: "" });
    const button = document.createElement("button");
    button.type = "button";
    button.title = prompt;
    button.setAttribute("aria-label", `Restore: ${prompt}, seed ${seed}`);
    button.append(image);
    button.addEventListener("click", () => this.#onRestore(entry));
    const item = document.createElement("li");
    item.dataset.settings = entry.texts.sana_sprint;
    if (entry.id !== undefined) item.dataset.id = entry.id;
    item.append(button);
    queueMicrotask(() => this.#onCount(this.#list.children.length));
    return item;
  }

  #remove(item) {
    URL.revokeObjectURL(item.querySelector("img").src);
    item.remove();
    if (item.dataset.id) request(this.#database, "readwrite", (store) => store.delete(Number(item.dataset.id)));
    this.#onCount(this.#list.children.length);
  }
}

/** The database, or null where the browser has none (private windows); the strip then lasts as long as the page. */
function openDatabase() {
  return new Promise((resolve) => {
    const opening = indexedDB.open(DATABASE, 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore(STORE, { keyPath: "id", autoIncrement: true });
    opening.onsuccess = () => resolve(opening.result);
    opening.onerror = () => resolve(null);
  });
}

/** The result of one operation on the store; undefined if it cannot be done. */
async function request(opening, mode, operate) {
  const database = await opening;
  if (!database) return undefined;
  return new Promise((resolve) => {
    const operation = operate(database.transaction(STORE, mode).objectStore(STORE));
    operation.onsuccess = () => resolve(operation.result);
    operation.onerror = () => resolve(undefined);
  });
}
