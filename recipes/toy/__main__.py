"""Distils the toy and draws it: `python -m recipes.toy docs/images/toy.png`. Prints the measurements."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from recipes.toy import world
from recipes.toy.distil import NUM_STEPS, Student, distil, few_steps, measure, one_step
from recipes.toy.plots import (
    AXIS,
    COLORS,
    REACH,
    SHARP,
    SIDE,
    TITLE,
    dots,
    empty_panel,
    font,
    place,
    save,
    spots,
)
from sana_sprint.trigflow import T_MAX

NUM_POINTS, NUM_PATHS = 1500, 60
CURVE_POINTS = 40


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
            distance = (one_step(student, noise) - path[-1].float()).square().sum(1).mean().sqrt()
            curve.append((step, distance.item()))

    student = distil(num_steps=arguments.steps, on_step=note_error)
    print(measure(student))
    ends = spots(path[-1])
    panels = [
        dots("data", world.draw(NUM_POINTS)),
        _paths("the teacher's paths from noise", path, ends),
        dots("student, 1 step", one_step(student, noise), ends),
        dots("student, 2 steps", few_steps(student, noise)),
        _curve(f"1-step error over {arguments.steps} updates", curve),
    ]
    save(panels, arguments.file, columns=len(panels))


def _paths(title: str, path: list[Tensor], ends: list[int]) -> Image.Image:
    panel, pen = empty_panel(title)
    inside = (path[0].abs().amax(1) < REACH).nonzero().squeeze(1).tolist()
    for i in inside[:NUM_PATHS]:
        pen.line([place(points[i]) for points in path], fill=COLORS[ends[i]], width=2)
        x, y = place(path[0][i])
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), outline=COLORS[ends[i]], width=2)
    return panel


def _curve(title: str, curve: list[tuple[int, float]]) -> Image.Image:
    """The error on a logarithmic axis from 0.05 to 5."""
    panel, pen = empty_panel(title)

    def at(step: int, value: float) -> tuple[float, float]:
        height = math.log(min(max(value, 0.05), 5) / 0.05) / math.log(100)
        return SHARP * SIDE * step / curve[-1][0], SHARP * (TITLE + SIDE * (1 - height))

    for value in (0.1, 0.2, 0.5, 1.0, 2.0):
        (left, y), (right, _) = at(0, value), at(curve[-1][0], value)
        pen.line((left, y, right, y), fill="#dddddd")
        pen.text((left + 8, y + 2), f"{value:g}", fill=AXIS, font=font(11))
    pen.line([at(step, value) for step, value in curve], fill="black", width=3)
    return panel


if __name__ == "__main__":
    main()
