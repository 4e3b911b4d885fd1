"""Pictures for the autoencoder alone: one to six things at random places and sizes, overlaps allowed.

Object pixels are the hard ones, and ordinary scenes have few of them. A third of the things come from all artwork that
was fetched, so that the latents hold for concepts that are added later.
"""

from __future__ import annotations

import random
import re
from functools import cache

import numpy as np
from PIL import Image

from recipes.emoji3d.artwork import HUES, STYLES, data_folder, sprite, takes_hue
from recipes.emoji3d.backgrounds import draw_background, sample_background
from recipes.emoji3d.concepts import concepts

_CODE_POINT = re.compile("[0-9a-f]{2,5}")
_SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}


def crowd(index: int, side: int) -> np.ndarray:
    """Picture number `index`: uint8 (side, side, 3)."""
    rng = random.Random(f"crowd-{index}")
    canvas = Image.fromarray(draw_background(sample_background(rng, plain=0.5), side))
    count = rng.choice((1, 2, 3, 4, 5, 6))
    largest = {1: 0.95, 2: 0.7, 3: 0.6}.get(count, 0.5)
    for _ in range(count):
        size = round(side * rng.uniform(0.26, largest))
        emoji, style = _draw(rng)
        hue = rng.choice(list(HUES)) if rng.random() < 0.3 and takes_hue(emoji, style) else None
        picture = sprite(emoji, style, hue, size, side=side)
        corner = (rng.randint(0, side - picture.width), rng.randint(0, side - picture.height))
        canvas.paste(picture, corner, picture)
    return np.asarray(canvas)


def _draw(rng: random.Random) -> tuple[str, str]:
    """An emoji and a style; the font lacks some of what was fetched."""
    if rng.random() < 2 / 3:
        return rng.choice(concepts("everyday")).emoji, rng.choice(STYLES)
    return rng.choice(_fetched()), "3D"


@cache
def _fetched() -> tuple[str, ...]:
    """All emoji of the fetched artwork but those with a skin tone."""
    names = (path.stem.split("-") for path in sorted((data_folder() / "fluent").glob("*.webp")))
    emoji = (
        [chr(int(point, 16)) for point in points]
        for points in names
        if all(map(_CODE_POINT.fullmatch, points))
    )
    return tuple("".join(each) for each in emoji if _SKIN_TONES.isdisjoint(each))
