"""Pictures: tensors in [-1,1] to PIL and back, grids, resizing, and settings in PNG files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_uint8(images: Tensor) -> np.ndarray:
    """(B,3,H,W) in [-1,1], clamped -> uint8 (B,H,W,3), rounded to nearest.

    Raises:
        ValueError: a value is not finite (a black picture would hide it).
    """
    if not torch.isfinite(images).all():
        raise ValueError("the picture has values that are not finite")
    scaled = images.float().clamp(-1, 1).add(1).mul(127.5).round()
    array: np.ndarray = scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return array


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B,3,H,W) in [-1,1] -> PIL pictures."""
    return [Image.fromarray(array) for array in to_uint8(images)]


def grid(pictures: Sequence[Image.Image], *, columns: int, gap: int = 2) -> Image.Image:
    """Equal-sized pictures in rows of `columns`, on white."""
    if not pictures:
        raise ValueError("a grid needs at least one picture")
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet
