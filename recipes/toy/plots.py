"""Panels of the plane: dots coloured by spot, side by side in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from recipes.toy import world

SIDE, GAP, TITLE = 300, 12, 28  # of a panel, pixels
SHARP = 2  # drawn this many times larger, then shrunk: smooth edges
REACH = 2.9  # a panel shows the plane from -REACH to REACH
COLORS = ("#d1495b", "#edae49", "#66a182", "#2e4057", "#8d6cab")  # one for each spot
AXIS = "#999999"


def save(panels: Sequence[Image.Image], file: Path, *, columns: int) -> None:
    """Writes panels in rows of `columns`, shrunk to their size."""
    rows = -(-len(panels) // columns)
    step = SIDE + GAP
    size = (columns * step - GAP, rows * (step + TITLE) - GAP)
    sheet = Image.new("RGB", size, "white")
    for i, panel in enumerate(panels):
        row, column = divmod(i, columns)
        small = panel.resize((SIDE, SIDE + TITLE), Image.Resampling.LANCZOS)
        sheet.paste(small, (column * step, row * (step + TITLE)))
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(128).save(file, optimize=True)


def spots(points: Tensor) -> list[int]:
    """The nearest spot of each point."""
    nearest: list[int] = torch.cdist(points.double(), world.SPOTS).argmin(1).tolist()
    return nearest


def empty_panel(title: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A panel with its title and frame, and the pen that draws in it."""
    panel = Image.new("RGB", (SHARP * SIDE, SHARP * (SIDE + TITLE)), "white")
    pen = ImageDraw.Draw(panel)
    pen.text((SHARP * 4, SHARP * 4), title, fill="black", font=font(15))
    pen.rectangle((0, SHARP * TITLE, SHARP * SIDE - 1, SHARP * (TITLE + SIDE) - 1), outline=AXIS)
    return panel, pen


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(SHARP * size)


def place(point: Tensor) -> tuple[float, float]:
    """A point of the plane -> pixels in a panel."""
    x, y = (point / REACH).tolist()
    return SHARP * SIDE * (1 + x) / 2, SHARP * (TITLE + SIDE * (1 - y) / 2)


def dots(title: str, points: Tensor, found: list[int] | None = None) -> Image.Image:
    """Dots coloured by spot; left out, by the nearest one."""
    panel, pen = empty_panel(title)
    for point, spot in zip(points, found or spots(points), strict=True):
        x, y = place(point)
        pen.ellipse((x - 2.5, y - 2.5, x + 2.5, y + 2.5), fill=COLORS[spot])
    return panel
