"""Curves as a picture, drawn with Pillow: enough for a few lines in a document."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

Curve = Sequence[tuple[float, float]]
WIDTH, HEIGHT, MARGIN, LINE = 480, 320, 48, 14  # of a panel, and of a line of text
COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b")


def draw_curves(panels: Mapping[str, Mapping[str, Curve]], path: Path) -> None:
    """Writes panels side by side, each with its title, its curves and their names; the vertical axis is logarithmic.

    Args:
        panels: title -> name of a curve -> points (x, y). Points whose y is not positive and finite are left out.
        path: of the PNG; its folder is made.

    Raises:
        ValueError: a panel has no point, or more curves than there are colours.
    """
    sheet = Image.new("RGB", (WIDTH * len(panels), HEIGHT), "white")
    for number, (title, curves) in enumerate(panels.items()):
        sheet.paste(_panel(title, curves), (WIDTH * number, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def _panel(title: str, curves: Mapping[str, Curve]) -> Image.Image:
    if len(curves) > len(COLORS):
        raise ValueError(f"{title}: {len(curves)} curves, and {len(COLORS)} colours")
    logs = {
        name: [(x, math.log10(y)) for x, y in curve if 0 < y < math.inf] for name, curve in curves.items()
    }
    points = [point for curve in logs.values() for point in curve]
    if not points:
        raise ValueError(f"{title}: there is nothing to draw")
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    panel = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(panel)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / ((right - left) or 1)
        up = (y - low) / ((high - low) or 1)
        return MARGIN + across * (WIDTH - 1.5 * MARGIN), HEIGHT - MARGIN - up * (HEIGHT - 2 * MARGIN)

    draw.text((MARGIN, LINE), title, fill="black")
    draw.rectangle((*place(left, high), *place(right, low)), outline="#bbbbbb")
    for y in (low, high):
        draw.text((4, place(left, y)[1] - LINE / 2), f"{10**y:.3g}", fill="black")
    for x in (left, right):
        draw.text((place(x, low)[0] - LINE, HEIGHT - MARGIN + 4), f"{x:g}", fill="black")
    for number, ((name, curve), color) in enumerate(zip(logs.items(), COLORS, strict=False)):
        draw.line([place(*point) for point in curve], fill=color, width=2)
        down = MARGIN + 4 + number * LINE
        draw.rectangle((WIDTH / 2 - 16, down + 4, WIDTH / 2 - 6, down + 8), fill=color)
        draw.text((WIDTH / 2, down), name, fill=color)
    return panel
