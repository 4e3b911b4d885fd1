"""Makes the pictures of the real-time page: its examples, drawn by the embedded model, and the README's screenshot.

python -m benchmarks.page_images             # needs Chromium and its driver, as the page's tests do
python -m benchmarks.page_images --examples  # the examples alone
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import tempfile
import time
from pathlib import Path

from PIL import Image

from sana_sprint import SanaSprintControlNetPipeline, SanaSprintPipeline
from sana_sprint.serve.engine import Engine, Pipelines
from tests.helpers.page import PageUser, browser, page_server

ROOT = Path(__file__).resolve().parents[1]
WEB = ROOT / "src" / "sana_sprint" / "serve" / "web"
SCREENSHOT = ROOT / "docs" / "images" / "page.png"
WIDTH, HEIGHT, VIEW_HEIGHT = (
    1200,
    1240,
    820,
)  # of the screenshot, and of the window that the page is laid out for
EDITS = 12  # time for the meter to settle


def draw_examples(pipeline: SanaSprintPipeline) -> None:
    """The pictures that examples.json names."""
    folder = WEB / "examples"
    folder.mkdir(exist_ok=True)
    for example in json.loads((WEB / "examples.json").read_text(encoding="utf-8"))["emoji"]:
        picture = pipeline(example["prompt"], 2, seed=example["seed"]).images[0]
        picture.save(folder / f"{example['picture']}.webp", quality=90)


def take_screenshot(pipelines: Pipelines) -> None:
    """The page with a picture, after a few others were looked at."""
    engine = Engine(lambda: pipelines)
    engine.wait_until_loaded()
    with (
        tempfile.TemporaryDirectory() as folder,
        page_server(engine) as address,
        browser(Path(folder)) as driver,
    ):
        user = PageUser(driver)
        size = {"width": WIDTH, "height": VIEW_HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        user.open(address)
        for button in reversed(driver.find_elements("css selector", "#examples button")):
            before = user.sequence()
            user.run("arguments[0].click()", button)
            user.wait_for(lambda before=before: user.sequence() > before)
            time.sleep(1.5)  # the page adds a picture to its history after a pause
        for i in range(EDITS):
            before = user.sequence()
            user.run(
                "document.getElementsByName('steps')[arguments[0]].click()", i % 2
            )  # ends with two steps
            user.wait_for(lambda before=before: user.sequence() > before)
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": HEIGHT, "scale": 1}
        shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    picture = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
    picture.quantize(256).save(SCREENSHOT, optimize=True)  # a third of the size
    print(f"{SCREENSHOT.relative_to(ROOT)}: {SCREENSHOT.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", action="store_true", help="draw the examples alone")
    arguments = parser.parse_args()
    control = SanaSprintControlNetPipeline.from_pretrained("emoji")
    pipeline = SanaSprintPipeline.from_pipe(control)
    for each in (pipeline, control):
        each.set_progress_bar_config(disable=True)
    draw_examples(pipeline)
    if not arguments.examples:
        take_screenshot(Pipelines(pipeline, control))


if __name__ == "__main__":
    main()
