"""Filters of lines and brightness (H,W) fp32: blur, dilation, erosion."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (H,W); `sigma` in pixels. The border is repeated."""
    radius = math.ceil(3 * sigma)
    steps = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-steps.square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    wider = padded(x, radius)
    return F.conv2d(F.conv2d(wider, kernel[None, None, None]), kernel[None, None, :, None])[0, 0]


def dilate(lines: Tensor, size: int) -> Tensor:
    """Maximum over the square of `size` pixels around each pixel of (H,W); the input itself for 1 and less."""
    if size <= 1:
        return lines
    before = (size - 1) // 2
    wider = F.pad(lines[None, None], (before, size - 1 - before) * 2, value=-math.inf)
    # Along rows, then along columns: 2 * size comparisons per pixel instead of its square.
    rows = F.max_pool2d(wider, (1, size), stride=1)
    return F.max_pool2d(rows, (size, 1), stride=1)[0, 0]


def erode(lines: Tensor, size: int) -> Tensor:
    """Minimum over the square of `size` pixels around each pixel of (H,W)."""
    return -dilate(-lines, size)


def padded(x: Tensor, margin: int) -> Tensor:
    """(H,W) with its border repeated `margin` pixels on all sides, (1,1,H+2*margin,W+2*margin)."""
    return F.pad(x[None, None], (margin,) * 4, mode="replicate")
