"""`sana-sprint demo`: the grid and its labels."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

import sana_sprint
from recipes.emoji import vocabulary
from sana_sprint.cli import demo
from sana_sprint.images import read_settings
from sana_sprint.models.controlnet import SanaControlNetModel
from sana_sprint.pipelines.controlnet import SanaSprintControlNetPipeline
from sana_sprint.weights import save_model
from tests.helpers.cli import assert_refused, call, save_tiny_model, succeed
from tests.helpers.models import randomize
from tests.helpers.pipeline import assert_same_pictures, tiny_pipeline

EMBEDDED = Path(sana_sprint.__file__).parent / "embedded" / "emoji"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory)


def test_grid_and_single_pictures(tiny, tmp_path):
    lines = succeed("demo", "--model", tiny, "-o", tmp_path).splitlines()
    assert lines[0] == str(tmp_path / "grid.png")
    assert [re.sub(r"\d+\.\d{3}", "T", line) for line in lines[2:]] == [
        "1 step   T s per picture on cpu",
        "2 steps  T s per picture on cpu",
        "4 steps  T s per picture on cpu",
    ]
    singles = sorted(path for path in tmp_path.iterdir() if path.name != "grid.png")
    assert len(singles) == len(demo.PROMPTS) * 3
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    for path in singles:
        with Image.open(path) as picture:
            settings = read_settings(picture)
            row, column = (
                demo.PROMPTS.index(settings["prompt"]),
                demo.STEPS.index(settings["num_inference_steps"]),
            )
            assert settings["seed"] == demo.FIRST_SEED + row
            left, top = (
                demo.LABEL_WIDTH + column * (32 + demo.GAP),
                demo.HEADER_HEIGHT + row * (32 + demo.GAP),
            )
            assert (sheet[top : top + 32, left : left + 32] == np.asarray(picture)).all()


def test_a_second_demo_replaces_the_first(tiny, tmp_path):
    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    succeed("demo", "--model", tiny, "-o", tmp_path)
    before = content()
    succeed("demo", "--model", tiny, "-o", tmp_path)
    assert content() == before


def test_the_output_is_a_folder():
    assert_refused(call("demo", "-o", "demo.png"), 2, "demo.png")


def test_labels_fit_and_large_pictures_are_shrunk():
    rows = ["a long label that takes several lines of the column", "short"]
    columns = [[Image.new("RGB", (1024, 512), color) for color in ("red", "blue")] for _ in range(2)]
    sheet = demo.labelled_grid(rows, ["1 step", "2 steps"], columns)
    assert sheet.size == (demo.LABEL_WIDTH + 2 * (256 + demo.GAP), demo.HEADER_HEIGHT + 2 * (128 + demo.GAP))
    pixels = np.asarray(sheet.convert("L"), dtype=int)
    has_ink = pixels < 100
    middle = demo.HEADER_HEIGHT + 128 + demo.GAP // 2
    for label in (
        has_ink[demo.HEADER_HEIGHT : middle, : demo.LABEL_WIDTH],
        has_ink[middle:, : demo.LABEL_WIDTH],
    ):
        assert label.any()
        assert not label[:, : demo.GAP].any()  # not cut at the left
        assert not label[:, -demo.GAP :].any()  # nor under the pictures
    headers = has_ink[: demo.HEADER_HEIGHT, demo.LABEL_WIDTH :]
    assert headers[:, :256].any()
    assert headers[:, 256 + demo.GAP :].any()


def test_wrapping_keeps_every_word():
    pen, font = ImageDraw.Draw(Image.new("RGB", (1, 1))), ImageFont.load_default(demo.FONT_SIZE)
    for prompt in (*demo.PROMPTS, "incomprehensibilities " * 2, "x"):
        lines = demo.wrapped(prompt, pen, font, 100).split("\n")
        assert " ".join(lines) == prompt.strip()
        assert all(pen.textlength(line, font) <= 100 or " " not in line for line in lines)


def test_prompts_are_of_the_emoji_world():
    assert len(set(demo.PROMPTS)) == len(demo.PROMPTS) >= 8
    nouns = {vocabulary.with_article(kind) for kind in vocabulary.KINDS}
    plurals = {
        f"{number} {vocabulary.plural(kind)}"
        for number in vocabulary.NUMBERS.values()
        for kind in vocabulary.KINDS
    }
    for prompt in demo.PROMPTS:
        subject, _, background = prompt.removesuffix(" background").partition(" on a ")
        assert background in {*vocabulary.BACKGROUNDS, ""}
        things = re.split(" and | left of | right of | above | below ", subject)
        assert set(things) <= nouns | plurals, prompt
        for thing in things:
            kind = next(kind for kind in vocabulary.KINDS if thing.endswith((kind, vocabulary.plural(kind))))
            assert not (background and vocabulary.clashes(kind, background)), prompt


def test_a_model_with_a_controlnet_draws_from_a_sketch(tiny, tmp_path):
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    branch = SanaControlNetModel.from_transformer(tiny_pipeline().transformer, num_layers=1)
    randomize(branch, seed=4)
    save_model(branch, model / "controlnet")
    output = tmp_path / "out"
    lines = succeed("demo", "--model", model, "-o", output).splitlines()
    assert lines[-3:] == [
        f"{output / 'sketch.png'}: a sketch",
        f"{output / 'sketch-seen.png'}: what the model sees of it",
        f"{output / 'sketch-drawn.png'}: {demo.SKETCH_PROMPT}",
    ]
    with Image.open(output / "sketch-seen.png") as seen:
        assert set(np.unique(np.asarray(seen))) == {0, 255}
    control = SanaSprintControlNetPipeline.from_pretrained(model)
    expected = control(
        demo.SKETCH_PROMPT, image=demo.heart_sketch(), kind="scribble", num_inference_steps=2, seed=0
    )
    assert_same_pictures(Image.open(output / "sketch-drawn.png"), expected.images[0])
    # The grid is drawn from text alone, as without a branch.
    succeed("demo", "--model", tiny, "-o", tmp_path / "plain")
    assert (output / "grid.png").read_bytes() == (tmp_path / "plain" / "grid.png").read_bytes()


def test_the_sketch_is_a_closed_line_left_of_the_middle():
    sketch = demo.heart_sketch()
    columns = np.flatnonzero((np.asarray(sketch.convert("L")) < 128).any(axis=0))
    assert columns[0] > 0
    assert columns[-1] < 0.75 * sketch.width  # so that a picture shows whether it follows
    ImageDraw.floodfill(sketch, (0, 0), (255, 0, 0))
    assert 0.1 < (np.asarray(sketch) == 255).all(axis=2).mean() < 0.5  # paint from outside does not get in


@pytest.mark.skipif(not EMBEDDED.is_dir(), reason="the small model is not in this checkout")
def test_the_default_model_makes_the_demo(tmp_path, monkeypatch):
    monkeypatch.delenv("SANA_SPRINT_MODEL", raising=False)
    succeed("demo", "-o", tmp_path)
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.width == demo.LABEL_WIDTH + 3 * (128 + demo.GAP)
