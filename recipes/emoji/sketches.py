"""Scenes with freely placed objects, and lines for a control branch to follow: edges and imitated hand drawings."""

from __future__ import annotations

import random

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from recipes.emoji import vocabulary as words
from recipes.emoji.scenes import NUM_CAPTIONS, SIZE, Placed, Scene, caption_of, describe, is_held_out, render
from sana_sprint.controls import blur, canny, dilate, erode, soft_edges

MARGIN = 2  # pixels between an object and the picture's edge
SIZES_OF_ONE, SIZES_OF_TWO = (48, 92), (46, 58)  # pixels
KINDS_OF_LINES = ("drawing", "drawing", "drawing", "canny", "softedge")
_OBJECT = 20.0  # levels of difference from the background above which a pixel belongs to an object


def free_scene(seed: int, *, held_out: bool = False) -> Scene:
    """Scene number `seed` of one or two objects at any place and size, which do not overlap.

    One in ten combinations of kinds is held out, as `scenes.sample_scene` does it.
    """
    rng = random.Random(f"free-{seed}-{held_out}")
    while True:
        kinds = rng.sample(list(words.KINDS), 1 if rng.random() < 0.55 else 2)
        background = rng.choice([b for b in words.BACKGROUNDS if not any(words.clashes(k, b) for k in kinds)])
        key = (kinds[0], background) if len(kinds) == 1 else tuple(sorted(kinds))
        if is_held_out(*key) == held_out:
            break
    objects = _places(kinds, rng)
    names_background = held_out or rng.random() < 0.6
    caption = caption_of(
        kinds, 1 if len(kinds) == 1 else 2, None, background if names_background else None, rng
    )
    task = "single" if len(kinds) == 1 else "two"
    return Scene(task, objects, background, names_background, None, caption)


def training_scene(index: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Sample `index`: (uint8 (SIZE,SIZE,3), captions), from the training split."""
    scene = free_scene(index)
    rng = random.Random(f"free-captions-{index}")
    others = [describe(scene, rng) for _ in range(NUM_CAPTIONS - 1)]
    return np.asarray(render(scene)), (scene.caption, *others)


def condition(pixels: np.ndarray, position: int) -> np.ndarray:
    """Makes the lines of the data set's picture `index`, white on black: uint8 (H,W,3), of one of `KINDS_OF_LINES`."""
    rng = random.Random(f"lines-{position}")
    kind = rng.choice(KINDS_OF_LINES)
    if kind == "drawing":
        lines = drawing(pixels, rng)
    else:
        grey = torch.tensor(np.asarray(Image.fromarray(pixels).convert("L"), dtype=np.float32) / 255)
        lines = canny(grey) if kind == "canny" else soft_edges(grey)
        lines = dilate(lines, rng.randint(1, 3))
    grey_lines = lines.mul(255).round().to(torch.uint8).numpy()
    return np.repeat(grey_lines[..., None], 3, axis=2)


def drawing(pixels: np.ndarray, rng: random.Random) -> Tensor:
    """The objects' outlines as an unsteady hand draws them: (H,W), 1 = line.

    Small shapes are rounded off, the outline deviates by up to a few pixels, line widths vary, lines have gaps, and
    sometimes inner edges are drawn too.
    """
    picture = torch.tensor(pixels, dtype=torch.float32)
    inside = ((picture - picture[0, 0]).abs().amax(dim=-1) > _OBJECT).float()
    rounded = (blur(inside, rng.uniform(1.0, 3.0)) > 0.5).float()
    outline = rounded - erode(rounded, 3)
    if rng.random() < 0.3:
        outline = torch.maximum(outline, canny(picture.mean(dim=-1) / 255))
    lines = (_wander(dilate(outline, 2), rng, rng.uniform(0, 3.5)) > 0.4).float()
    if rng.random() < 0.3:
        lines = lines * (_noise(rng, lines.shape, 8) > -1.3)
    return dilate(lines, rng.randint(1, 5))


def _wander(lines: Tensor, rng: random.Random, pixels: float) -> Tensor:
    """Lines moved by a smooth random field of this standard deviation."""
    height, width = lines.shape
    identity = torch.eye(2, 3)[None]
    grid = F.affine_grid(identity, [1, 1, height, width], align_corners=False)
    shift = torch.stack([_noise(rng, lines.shape, 14) for _ in range(2)], dim=-1)[None]
    scale = torch.tensor([2 * pixels / width, 2 * pixels / height])
    return F.grid_sample(lines[None, None], grid + scale * shift, align_corners=False)[0, 0]


def _noise(rng: random.Random, shape: tuple[int, ...], sigma: float) -> Tensor:
    """Normal noise (H,W), smooth over `sigma` pixels."""
    generator = torch.Generator().manual_seed(rng.getrandbits(31))
    coarse = torch.randn(1, 1, *(max(2, round(side / (2 * sigma))) for side in shape), generator=generator)
    return F.interpolate(coarse, size=shape, mode="bicubic")[0, 0]


def _places(kinds: list[str], rng: random.Random) -> tuple[Placed, ...]:
    low, high = SIZES_OF_ONE if len(kinds) == 1 else SIZES_OF_TWO
    while True:
        placed = [_anywhere(kind, rng.uniform(low, high), rng) for kind in kinds]
        if len(placed) == 1:
            return tuple(placed)
        first, second = placed
        apart = (first.size + second.size) / 2 + MARGIN
        if max(abs(first.x - second.x), abs(first.y - second.y)) >= apart:
            return tuple(placed)


def _anywhere(kind: str, size: float, rng: random.Random) -> Placed:
    reach = size / 2 + MARGIN
    return Placed(kind, rng.uniform(reach, SIZE - reach), rng.uniform(reach, SIZE - reach), size)
