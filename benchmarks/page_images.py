"""Makes the pictures of the real-time page: its examples, drawn by the embedded model, and the README's screenshot.

python -m benchmarks.page_images             # needs Chromium and its driver, as the page's tests do
python -m benchmarks.page_images --examples  # the examples alone
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from pathlib import Path

from PIL import Image

from sana_sprint import SanaSprintPipeline
from sana_sprint.serve.engine import Engine
from tests._page import PageUser, browser, page_server

ROOT = Path(__file__).resolve().parents[1]
WEB = ROOT / "src" / "sana_sprint" / "serve" / "web"
SCREENSHOT = ROOT / "docs" / "images" / "page.png"
COLORS = 160  # of the screenshot's palette: more make a larger file, and no difference to the eye
SHOWN = ("a zebra on an orange background", "three stars on a purple background")  # for the history


def draw_examples(pipeline: SanaSprintPipeline) -> None:
    """The pictures that examples.json names."""
    folder = WEB / "examples"
    folder.mkdir(exist_ok=True)
    for example in json.loads((WEB / "examples.json").read_text(encoding="utf-8"))["emoji"]:
        picture = pipeline(example["prompt"], 2, seed=example["seed"]).images[0]
        picture.save(folder / f"{example['picture']}.webp", quality=90)


def take_screenshot(pipeline: SanaSprintPipeline) -> None:
    """The page with a picture, after a few others were looked at."""
    engine = Engine(lambda: pipeline)
    engine.wait_until_loaded()
    with (
        tempfile.TemporaryDirectory() as folder,
        page_server(engine) as address,
        browser(Path(folder), width=1280, height=1200) as driver,
    ):
        user = PageUser(driver)
        user.open(address)
        for button in reversed(driver.find_elements("css selector", "#examples button")):
            before = user.sequence()
            user.run("arguments[0].click()", button)
            user.wait_for(lambda before=before: user.sequence() > before)
            time.sleep(1.5)  # the page keeps a picture that one pauses at
        user.run("scrollTo(0, 0); document.activeElement.blur()")
        for _ in range(6):  # the meter shows a pace that one typing has
            before = user.sequence()
            user.run("arguments[0].click()", user.by_id("dice"))
            user.wait_for(lambda before=before: user.sequence() > before)
        shot = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
    shot.quantize(COLORS, dither=Image.Dither.NONE).save(SCREENSHOT, optimize=True)
    print(f"{SCREENSHOT.relative_to(ROOT)}: {SCREENSHOT.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--examples", action="store_true", help="draw the examples alone")
    arguments = parser.parse_args()
    pipeline = SanaSprintPipeline.from_pretrained("emoji")
    pipeline.set_progress_bar_config(disable=True)
    draw_examples(pipeline)
    if not arguments.examples:
        take_screenshot(pipeline)


if __name__ == "__main__":
    main()
