"""Sketches for the tests of control pictures."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from sana_sprint.controls import control_picture

SIDE = 64


def bar(
    mode: str = "RGB", canvas: Any = "white", ink: Any = "black", size: int = SIDE, width: int = 4
) -> Image.Image:
    """A vertical stroke at a quarter of the width, in the upper half."""
    picture = Image.new(mode, (size, size), canvas)
    ImageDraw.Draw(picture).rectangle(
        (size // 4 - width // 2, 0, size // 4 - width // 2 + width - 1, size // 2 - 1), fill=ink
    )
    return picture


def lines_of(picture: Any, kind: str = "scribble", **settings: Any) -> Tensor:
    """The condition's lines (64,64) as booleans."""
    seen = control_picture(picture, kind, SIDE, SIDE, **settings)
    assert seen.shape == (1, 3, SIDE, SIDE)
    assert torch.equal(seen[:, :1].expand_as(seen), seen)
    return seen[0, 0] > 0


EXPECTED = torch.zeros(SIDE, SIDE, dtype=torch.bool)
EXPECTED[:32, 14:18] = True


def disc(contrast: float = 1.0) -> Tensor:
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    return (torch.hypot(y - 31.5, x - 31.5) < 20).float() * contrast
