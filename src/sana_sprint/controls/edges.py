"""Edges of a brightness (H,W) fp32 in [0,1]: thin ones (Canny 1986) and soft ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sana_sprint.controls.filters import blur, dilate, padded
from sana_sprint.controls.kinds import MIN_CONTRAST

# Canny's blur, in pixels, and its thresholds, as fractions of the largest possible gradient.
CANNY_SIGMA, CANNY_LOW, CANNY_HIGH = 1.4, 0.05, 0.12
SOFT_SIGMA = 1.0


def canny(grey: Tensor) -> Tensor:
    """Edges one pixel wide (Canny 1986) of a brightness (H,W) in [0,1]: strong ridges of its gradient, and weak ones connected
    to them."""
    dx, dy = _slopes(blur(grey, CANNY_SIGMA))
    slope = torch.hypot(dx, dy)
    windows = F.unfold(padded(slope, 1), 3)[0].view(9, *grey.shape)
    # The neighbours across the edge: 0 for a slope along x, 1 down-right, 2 along y, 3 down-left.
    direction = (torch.atan2(dy, dx) / (math.pi / 4)).round().long() % 4
    ahead = torch.stack([windows[cell] for cell in (5, 8, 7, 6)]).gather(0, direction[None])[0]
    behind = torch.stack([windows[cell] for cell in (3, 0, 1, 2)]).gather(0, direction[None])[0]
    ridge = (slope >= ahead) & (slope > behind)  # of two equal neighbours one
    weak = (ridge & (slope > CANNY_LOW)).float()
    edges = (ridge & (slope > CANNY_HIGH)).float()
    while True:
        grown = torch.minimum(dilate(edges, 3), weak)
        if torch.equal(grown, edges):
            return edges
        edges = grown


def soft_edges(grey: Tensor) -> Tensor:
    """Gradient magnitude of a smoothed brightness (H,W) in [0,1], scaled to a maximum of 1."""
    dx, dy = _slopes(blur(grey, SOFT_SIGMA))
    slope = torch.hypot(dx, dy)
    strongest = float(slope.max())
    return slope / strongest if strongest > MIN_CONTRAST / 4 else torch.zeros_like(slope)


def _slopes(grey: Tensor) -> tuple[Tensor, Tensor]:
    """Sobel gradients along x and y, (H,W) each; 1 for a step from 0 to 1."""
    kernel = grey.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4
    both = F.conv2d(padded(grey, 1), torch.stack([kernel, kernel.T])[:, None])[0]
    return both[0], both[1]
