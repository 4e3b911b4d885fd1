"""Lines for a control branch to follow: edges of the pictures, and imitated hand drawings of their things."""

from __future__ import annotations

import random

import numpy as np
import torch
from PIL import Image

from recipes.emoji.sketches import drawing
from recipes.emoji3d.artwork import sprite
from recipes.emoji3d.scenes import Scene, sample_scene
from sana_sprint.controls import canny, dilate, soft_edges

KINDS_OF_LINES = ("drawing", "drawing", "drawing", "canny", "softedge")


def everyday_128(pixels: np.ndarray, position: int) -> np.ndarray:
    """Makes the lines of `samples.everyday_128`'s sample `position`, white on black: uint8 (H,W,3)."""
    return _lines(pixels, sample_scene(position), f"lines3d-{position}")


def all_256(pixels: np.ndarray, position: int) -> np.ndarray:
    """Makes the lines of `samples.all_256`'s sample `position`, white on black: uint8 (H,W,3)."""
    return _lines(pixels, sample_scene(position, tier="all"), f"lines3d-{position}")


def _lines(pixels: np.ndarray, scene: Scene, seed: str) -> np.ndarray:
    rng = random.Random(seed)
    kind = rng.choice(KINDS_OF_LINES)
    if kind == "drawing":
        # A pattern is no outline: the hand draws the things alone, whatever is behind them.
        lines = drawing(coverage(scene, pixels.shape[0]), rng)
    else:
        gray = torch.tensor(np.asarray(Image.fromarray(pixels).convert("L"), dtype=np.float32) / 255)
        lines = dilate(canny(gray) if kind == "canny" else soft_edges(gray), rng.randint(1, 3))
    levels = lines.mul(255).round().to(torch.uint8).numpy()
    return np.repeat(levels[..., None], 3, axis=2)


def coverage(scene: Scene, side: int) -> np.ndarray:
    """The scene's things in white on black: uint8 (side, side, 3)."""
    canvas = Image.new("L", (side, side))
    for thing in scene.things:
        kind = thing.kind
        picture = sprite(kind.concept.emoji, scene.style, kind.hue, round(thing.size * side), side=side)
        opacity = picture.getchannel("A")
        corner = (
            round(thing.x * side - picture.width / 2),
            round(thing.y * side - picture.height / 2),
        )
        # Gray levels apart keep the outline between two things that touch.
        level = 255 - 40 * scene.things.index(thing)
        canvas.paste(level, corner, opacity.point(lambda value: 255 * (value > 127)))
    return np.repeat(np.asarray(canvas)[..., None], 3, axis=2)
