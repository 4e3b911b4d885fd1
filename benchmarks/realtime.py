"""Measures the latency from a key or a stroke to the picture on screen, in headless Chromium with the real server.

python -m benchmarks.realtime                    # the embedded model, 2 steps
python -m benchmarks.realtime --steps 1 --edits 50

Times are the browser's own: from the moment the input changes to the animation frame after the picture with that input
was drawn into the page. "word" is a change that ends a word, "letter" one within a word, which first waits for a pause
in the typing. The stroke is drawn if the model has a ControlNet. Needs Chromium and its driver, as the page's tests do.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sana_sprint.cli.loading import ModelOptions
from sana_sprint.cli.options import Dtype
from sana_sprint.cli.serve import load_pipelines
from sana_sprint.serve.engine import Engine
from tests.helpers.page import PageUser, browser, page_server

WORDS = ("cat", "dog", "pizza", "rocket", "banana", "zebra", "donut", "horse")
SETTLE_S = 600.0  # a model of 1.6B on a CPU is slow

# Change the input, wait for the picture of that change, then for a moment of quiet: (change, times, quiet in ms) -> ms.
MEASURE = """
    const picture = document.getElementById("picture");
    const frame = () => new Promise((resolve) => requestAnimationFrame(resolve));
    const shown = () => new Promise((resolve) => {
      const observer = new MutationObserver(() => {
        observer.disconnect();
        frame().then(() => resolve(performance.now()));
      });
      observer.observe(picture, { attributes: true, attributeFilter: ["data-sequence"] });
    });
    const measure = async (change, count) => {
      const times = [];
      for (let i = 0; i < count; i++) {
        const next = shown();
        const started = performance.now();
        change(i);
        times.push((await next) - started);
        await new Promise((resolve) => setTimeout(resolve, 120));
      }
      return times;
    };
"""
TYPE = """
    const [words, ending, count, done] = arguments;
    const box = document.getElementById("prompt");
    const type = (i) => {
      box.value = `${words[i % words.length]} ${i} on a blue background${ending}`;
      box.dispatchEvent(new InputEvent("input", { inputType: "insertText", data: ending, bubbles: true }));
    };
    measure(type, count).then(done);
"""
STROKE = """
    const [count, done] = arguments;
    const pad = document.getElementById("pad");
    pad.setPointerCapture = () => {};  // these pointers are not real
    const box = pad.getBoundingClientRect();
    const point = (type, x, y) => pad.dispatchEvent(new PointerEvent(type, {
      pointerId: 1, button: 0, clientX: box.left + x * box.width, clientY: box.top + y * box.height,
    }));
    point("pointerdown", 0.1, 0.1);
    const draw = (i) => point("pointermove", 0.1 + 0.8 * ((i * 7) % 10) / 10, 0.1 + 0.08 * (i % 10));
    measure(draw, count).then((times) => { point("pointerup", 0.5, 0.5); done(times); });
"""
PLAY = """
    const [seconds, done] = arguments;
    const picture = document.getElementById("picture");
    const roll = document.getElementById("roll");
    roll.click();
    const [first, started] = [Number(picture.dataset.sequence), performance.now()];
    setTimeout(() => {
      const count = Number(picture.dataset.sequence) - first;
      roll.click();
      done(count / ((performance.now() - started) / 1000));
    }, 1000 * seconds);
"""


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def measure(user: PageUser, edits: int, seconds: float, steps: int) -> dict[str, Any]:
    """All numbers; milliseconds, and pictures per second."""
    user.run(f"document.querySelector('[name=steps][value=\"{steps}\"]').click()")
    run = user.driver.execute_async_script
    times = {
        "word": run(MEASURE + TYPE, WORDS, " ", edits),
        "letter": run(MEASURE + TYPE, WORDS, "", edits),
    }
    if user.by_id("sketch").is_displayed():
        times["stroke"] = run(MEASURE + STROKE, edits)
    found: dict[str, Any] = {
        name: {"p50": round(statistics.median(of)), "p95": round(percentile(of, 0.95))}
        for name, of in times.items()
    }
    return {**found, "pictures_per_s": round(run(PLAY, seconds), 1)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="emoji", help="as for `sana-sprint serve`")
    parser.add_argument("--steps", type=int, default=2, choices=(1, 2, 3, 4))
    parser.add_argument("--edits", type=int, default=40, help="of each kind")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="how long pictures are drawn without a pause"
    )
    parser.add_argument("--threads", type=int, help="of torch; its own choice if left out")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    engine = Engine(lambda: load_pipelines(ModelOptions(arguments.model, Dtype.AUTO, "auto")))
    engine.wait_until_loaded()
    with (
        tempfile.TemporaryDirectory() as folder,
        page_server(engine) as address,
        browser(Path(folder)) as driver,
    ):
        driver.set_script_timeout(SETTLE_S)
        user = PageUser(driver)
        user.open(address)
        found = measure(user, arguments.edits, arguments.seconds, arguments.steps)
    for name, value in found.items():
        print(f"{name:<16}{value}")
    setting = {
        "model": arguments.model,
        "steps": arguments.steps,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
    }
    print(json.dumps({**setting, **found}))


if __name__ == "__main__":
    main()
