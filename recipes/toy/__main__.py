"""Distils the toy and draws it: `python -m recipes.toy docs/images/toy.png`. Prints the measurements."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from recipes.toy import world
from recipes.toy.distil import NUM_STEPS, Student, distil, few_steps, measure
from sana_sprint.trigflow import T_MAX, to_clean

SIDE, GAP, TITLE = 300, 12, 28  # of a panel, pixels
SHARP = 2  # drawn this many times larger, then shrunk: smooth edges
REACH = 2.9  # a panel shows the plane from -REACH to REACH
NUM_POINTS, NUM_PATHS = 1500, 60
CURVE_POINTS = 40
COLORS = ("#d1495b", "#edae49", "#66a182", "#2e4057", "#8d6cab")  # one for each spot
AXIS = "#999999"


def main() -> None:
    """Trains, measures, draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=Path("docs/images/toy.png"))
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="of training")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    noise = torch.randn(NUM_POINTS, 2)
    top = torch.full((NUM_POINTS,), T_MAX)
    path = world.follow(world.teacher, noise.double(), top.double())
    curve: list[tuple[int, float]] = []
    every = max(1, arguments.steps // CURVE_POINTS)

    def note_error(step: int, student: Student) -> None:
        if step % every == 0 or step == arguments.steps - 1:
            distance = (_one_step(student, noise) - path[-1].float()).square().sum(1).mean().sqrt()
            curve.append((step, distance.item()))

    student = distil(num_steps=arguments.steps, on_step=note_error)
    print(measure(student))
    spots = _spots(path[-1])
    panels = [
        _points("data", world.draw(NUM_POINTS)),
        _paths("the teacher's paths from noise", path, spots),
        _points("student, 1 step", _one_step(student, noise), spots),
        _points("student, 2 steps", few_steps(student, noise)),
        _curve(f"1-step error over {arguments.steps} updates", curve),
    ]
    sheet = Image.new("RGB", (len(panels) * (SIDE + GAP) - GAP, SIDE + TITLE), "white")
    for i, panel in enumerate(panels):
        sheet.paste(panel.resize((SIDE, SIDE + TITLE), Image.Resampling.LANCZOS), (i * (SIDE + GAP), 0))
    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(128).save(arguments.file, optimize=True)


@torch.no_grad()
def _one_step(student: Student, noise: Tensor) -> Tensor:
    top = torch.full((len(noise),), T_MAX)
    return to_clean(noise, student(noise, top), top)


def _spots(points: Tensor) -> list[int]:
    """The nearest spot of each point."""
    nearest: list[int] = torch.cdist(points.double(), world.SPOTS).argmin(1).tolist()
    return nearest


def _panel(title: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    panel = Image.new("RGB", (SHARP * SIDE, SHARP * (SIDE + TITLE)), "white")
    pen = ImageDraw.Draw(panel)
    pen.text((SHARP * 4, SHARP * 4), title, fill="black", font=_font(15))
    pen.rectangle((0, SHARP * TITLE, SHARP * SIDE - 1, SHARP * (TITLE + SIDE) - 1), outline=AXIS)
    return panel, pen


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(SHARP * size)


def _place(point: Tensor) -> tuple[float, float]:
    """A point of the plane -> pixels in a panel."""
    x, y = (point / REACH).tolist()
    return SHARP * SIDE * (1 + x) / 2, SHARP * (TITLE + SIDE * (1 - y) / 2)


def _points(title: str, points: Tensor, spots: list[int] | None = None) -> Image.Image:
    """Dots coloured by spot; left out, by the nearest one."""
    panel, pen = _panel(title)
    for point, spot in zip(points, spots or _spots(points), strict=True):
        x, y = _place(point)
        pen.ellipse((x - 2.5, y - 2.5, x + 2.5, y + 2.5), fill=COLORS[spot])
    return panel


def _paths(title: str, path: list[Tensor], spots: list[int]) -> Image.Image:
    panel, pen = _panel(title)
    inside = (path[0].abs().amax(1) < REACH).nonzero().squeeze(1).tolist()
    for i in inside[:NUM_PATHS]:
        pen.line([_place(points[i]) for points in path], fill=COLORS[spots[i]], width=2)
        x, y = _place(path[0][i])
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), outline=COLORS[spots[i]], width=2)
    return panel


def _curve(title: str, curve: list[tuple[int, float]]) -> Image.Image:
    """The error on a logarithmic axis from 0.05 to 5."""
    panel, pen = _panel(title)

    def place(step: int, value: float) -> tuple[float, float]:
        height = math.log(min(max(value, 0.05), 5) / 0.05) / math.log(100)
        return SHARP * SIDE * step / curve[-1][0], SHARP * (TITLE + SIDE * (1 - height))

    for value in (0.1, 0.2, 0.5, 1.0, 2.0):
        (left, y), (right, _) = place(0, value), place(curve[-1][0], value)
        pen.line((left, y, right, y), fill="#dddddd")
        pen.text((left + 8, y + 2), f"{value:g}", fill=AXIS, font=_font(11))
    pen.line([place(step, value) for step, value in curve], fill="black", width=3)
    return panel


if __name__ == "__main__":
    main()
