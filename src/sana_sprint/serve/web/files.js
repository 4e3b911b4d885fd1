// Pictures from outside: dropped on the page, pasted, or chosen.

/** onFile(blob) gets the first picture of a drop, a paste or the file dialogue. */
export function bindFiles(input, onFile) {
  const take = (files) => {
    const picture = [...files].find(({ type }) => type.startsWith("image/"));
    if (picture) onFile(picture);
    return picture !== undefined;
  };
  addEventListener("dragover", (event) => {
    event.preventDefault(); // or the browser would leave the page for the file
    document.body.classList.add("dropping");
  });
  addEventListener("dragleave", (event) => event.relatedTarget ?? document.body.classList.remove("dropping"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    take(event.dataTransfer.files);
  });
  addEventListener("paste", (event) => {
    if (take(event.clipboardData.files)) event.preventDefault();
  });
  input.addEventListener("change", () => {
    take(input.files);
    input.value = ""; // the same file may be chosen again
  });
}

/** Let the browser save a file. */
export function save(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000); // not before the browser has read it
}
