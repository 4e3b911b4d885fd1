// Example prompts. Those for the embedded model have pictures, which it drew (benchmarks/page_images.py).

const STEPS = 2; // with which the pictures were drawn

/** Examples for a model by its name: [{prompt, seed, steps, and perhaps the name of a picture}]. */
export async function examplesFor(model) {
  const all = await (await fetch("web/examples.json")).json();
  return (all[model] ?? all.others).map((example) => ({ ...example, steps: STEPS }));
}

/** Show them; onChoose({prompt, seed, steps}) is called when one is chosen. */
export function showExamples(list, examples, onChoose) {
  list.replaceChildren(...examples.map((example) => showExample(example, onChoose)));
}

function showExample({ picture, ...settings }, onChoose) {
  const button = document.createElement("button");
  button.type = "button";
  button.addEventListener("click", () => onChoose(settings));
  if (picture) {
    const image = Object.assign(new Image(128, 128), { alt: "", loading: "lazy" });
    image.src = `web/examples/${picture}.webp`; // after `loading`, which would come too late
    button.append(image);
  }
  button.append(Object.assign(document.createElement("span"), { textContent: settings.prompt }));
  const item = document.createElement("li");
  item.append(button);
  return item;
}
