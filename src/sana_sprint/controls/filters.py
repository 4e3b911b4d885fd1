"""Blurring, widening and thinning lines (H,W) fp32, and fitting pictures into a size."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sana_sprint.images import resize_and_crop
from sana_sprint.resolutions import cover


def blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (H,W); `sigma` in pixels. The border goes on outside."""
    radius = math.ceil(3 * sigma)
    steps = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-steps.square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    wider = padded(x, radius)
    return F.conv2d(F.conv2d(wider, kernel[None, None, None]), kernel[None, None, :, None])[0, 0]


def dilate(lines: Tensor, size: int) -> Tensor:
    """The largest value in each square of `size` pixels around a pixel of (H,W); 1 and less changes nothing."""
    if size <= 1:
        return lines
    before = (size - 1) // 2
    wider = F.pad(lines[None, None], (before, size - 1 - before) * 2, value=-math.inf)
    rows = F.max_pool2d(
        wider, (1, size), stride=1
    )  # the largest of a square is the largest of its rows' largest
    return F.max_pool2d(rows, (size, 1), stride=1)[0, 0]


def erode(lines: Tensor, size: int) -> Tensor:
    """The smallest value in each square of `size` pixels around a pixel of (H,W)."""
    return -dilate(-lines, size)


def padded(x: Tensor, margin: int) -> Tensor:
    """(H,W) with its border repeated `margin` pixels on all sides, (1,1,H+2*margin,W+2*margin)."""
    return F.pad(x[None, None], (margin,) * 4, mode="replicate")


def fitted(images: Tensor, height: int, width: int) -> Tensor:
    """(B,C,H,W) scaled alike in both directions until it covers the size; its centre, (B,C,height,width)."""
    plan = cover(images.shape[-2], images.shape[-1], height, width)
    return resize_and_crop(
        images, resized=(plan.height, plan.width), corner=(plan.top, plan.left), size=(height, width)
    )
