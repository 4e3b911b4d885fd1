"""`sana-sprint demo`: what the small model can draw, as one labelled grid, and what it makes of a sketch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from sana_sprint.cli import options
from sana_sprint.cli.common import console
from sana_sprint.cli.drawing import draw, progress_bar
from sana_sprint.cli.loading import ModelOptions, load_pair
from sana_sprint.cli.pictures import check_target, slug, write_picture

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

    from sana_sprint.pipelines.controlnet import SanaSprintControlNetPipeline

# The kinds of scene that the small model knows: one thing, several, two things, colours, places.
PROMPTS = (
    "a cat on a blue background",
    "a pizza on a white background",
    "a rocket on a black background",
    "two apples on a yellow background",
    "three stars on a purple background",
    "four fish on a pink background",
    "a dog and a banana",
    "an elephant left of a tree",
    "an airplane above a house",
    "a red heart and a blue circle on a white background",
)
STEPS = (1, 2, 4)
FIRST_SEED = 0  # row i has seed FIRST_SEED + i in all columns
SKETCH_PROMPT, SKETCH_STEPS = "a red heart on a white background", 2

# The grid, in pixels.
CELL = 256  # larger pictures are shrunk to this
GAP = 4
LABEL_WIDTH = 170
HEADER_HEIGHT = 28
FONT_SIZE = 16
INK, PAPER = "black", "#e8e8e8"  # not white, which backgrounds of pictures are


def demo(
    output: options.Folder = Path("demo"),
    model: options.Model = "emoji",
    dtype: options.DtypeOption = options.Dtype.AUTO,
    device: options.Device = "auto",
) -> None:
    """Draw ten prompts in 1, 2 and 4 steps as one labelled grid.

    Writes grid.png and the single pictures. Seeds are fixed: each run gives the same pictures and replaces those of the
    run before. A model with a ControlNet also draws from a sketch.
    """
    check_target(output, len(PROMPTS) * len(STEPS) + 4)
    jobs = [(prompt, FIRST_SEED + row) for row, prompt in enumerate(PROMPTS)]
    with console().status(f"loading {model}"):
        pipeline, control = load_pair(ModelOptions(model, dtype, device))
        list(draw(pipeline, jobs[:1], {"num_inference_steps": 1}))  # what is set up once is not timed
    columns, seconds = [], []
    with progress_bar() as bar:
        task = bar.add_task("drawing", total=len(jobs) * sum(STEPS))
        for steps in STEPS:
            arguments = {"num_inference_steps": steps}
            drawn = list(draw(pipeline, jobs, arguments, on_progress=lambda count: bar.advance(task, count)))
            for picture in drawn:
                name = f"{slug(picture.prompt)}-{steps}-{_steps_word(steps)}"
                write_picture(picture.image, output, name, picture.settings(model), replace=True)
            columns.append([picture.image for picture in drawn])
            seconds.append(sum(picture.seconds for picture in drawn) / len(drawn))
    headers = [f"{steps} {_steps_word(steps)}" for steps in STEPS]
    sheet = labelled_grid(PROMPTS, headers, columns)
    grid = output / "grid.png"
    sheet.save(grid)
    typer.echo(f"{grid}\nand {len(PROMPTS) * len(STEPS)} single pictures in {output}")
    for header, mean in zip(headers, seconds, strict=True):
        typer.echo(f"{header:<8} {mean:.3f} s per picture on {pipeline.device}")
    if control is not None:
        for line in _follow_sketch(control, output, model):
            typer.echo(line)


def _steps_word(steps: int) -> str:
    return "step" if steps == 1 else "steps"


# ----- the sketch -----------------------------------------------------------------------------------------------------


def _follow_sketch(pipeline: SanaSprintControlNetPipeline, output: Path, model: str) -> list[str]:
    """Writes a sketch, what the model sees of it, and what it draws; returns lines that say where."""
    sketch = heart_sketch()
    arguments = {"image": sketch, "kind": "scribble", "num_inference_steps": SKETCH_STEPS}
    (drawn,) = draw(pipeline, [(SKETCH_PROMPT, FIRST_SEED)], arguments)
    settings = {**drawn.settings(model), "kind": "scribble"}
    lines = []
    for name, picture, what in (
        ("sketch", sketch, "a sketch"),
        ("sketch-seen", drawn.output.conditions[0], "what the model sees of it"),
        ("sketch-drawn", drawn.image, SKETCH_PROMPT),
    ):
        path = write_picture(picture, output, name, settings, replace=True)
        lines.append(f"{path}: {what}")
    return lines


def heart_sketch(side: int = 256) -> Image.Image:
    """A heart's outline, black on white, as an unsteady hand draws it: tilted, and left of the middle."""
    from PIL import Image, ImageDraw

    points = []
    for step in range(201):
        turn = 2 * math.pi * step / 200
        unsteady = 1 + 0.03 * math.sin(5 * turn + 1) + 0.02 * math.sin(11 * turn)
        x = unsteady * 16 * math.sin(turn) ** 3
        y = -unsteady * sum(size * math.cos(k * turn) for k, size in enumerate((13, -5, -2, -1), 1))
        points.append(((0.4 + 0.017 * (x - 0.15 * y)) * side, (0.5 + 0.017 * (y + 0.15 * x)) * side))
    sketch = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(sketch).line(points, fill="black", width=max(1, side // 50), joint="curve")
    return sketch


# ----- the grid -------------------------------------------------------------------------------------------------------


def labelled_grid(
    row_labels: Sequence[str], column_labels: Sequence[str], columns: Sequence[Sequence[Image.Image]]
) -> Image.Image:
    """Equal-sized pictures in a table with its labels written out.

    Args:
        row_labels: left of each row, wrapped to fit.
        column_labels: above each column.
        columns: one picture per row each.
    """
    from PIL import Image, ImageDraw, ImageFont

    width, height = _cell_size(columns[0][0])
    sheet = Image.new(
        "RGB",
        (LABEL_WIDTH + len(columns) * (width + GAP), HEADER_HEIGHT + len(row_labels) * (height + GAP)),
        PAPER,
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for i, (label, pictures) in enumerate(zip(column_labels, columns, strict=True)):
        left = LABEL_WIDTH + i * (width + GAP)
        pen.text((left + width / 2, HEADER_HEIGHT / 2), label, INK, font, anchor="mm")
        for row, picture in enumerate(pictures):
            sheet.paste(picture.resize((width, height)), (left, HEADER_HEIGHT + row * (height + GAP)))
    for row, label in enumerate(row_labels):
        middle = HEADER_HEIGHT + row * (height + GAP) + height / 2
        text = wrapped(label, pen, font, LABEL_WIDTH - 4 * GAP)
        pen.multiline_text((2 * GAP, middle), text, INK, font, anchor="lm")
    return sheet


def _cell_size(picture: Image.Image) -> tuple[int, int]:
    scale = min(1.0, CELL / max(picture.size))
    return round(picture.width * scale), round(picture.height * scale)


def wrapped(
    text: str, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float
) -> str:
    """`text` broken into lines of at most `width` pixels, between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and pen.textlength(longer, font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
