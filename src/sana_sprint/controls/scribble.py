"""Scribbles: the lines of a user's drawing, and lines that look drawn by hand from soft edges.

Lines are (H,W) fp32, 1 = line and 0 = none.
"""

from __future__ import annotations

import math

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sana_sprint.controls.filters import blur, dilate, erode, padded
from sana_sprint.controls.kinds import MIN_CONTRAST, BlankPictureError
from sana_sprint.images import from_pil, resize_to_cover

INK_SHARE = 0.25  # of the strongest ink's contrast: fainter marks are smudges


def scribble(picture: Image.Image, height: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Lines (height,width) of a drawing: the pixels that differ from its canvas, which is the median colour.

    Raises BlankPictureError if none does; a transparent drawing is tried on white, then on black.
    """
    for background in ("white", "black"):  # strokes may be as white as the first
        ink = _ink(from_pil(picture, background=background, device=device))
        if float(ink.max()) >= MIN_CONTRAST:
            break
        if not picture.has_transparency_data:
            break
    strongest = float(ink.max())
    if strongest < MIN_CONTRAST:
        raise BlankPictureError("the picture is blank: draw lines on it")
    lines = (ink > max(INK_SHARE * strongest, MIN_CONTRAST / 2)).float()
    # Widened first, so that no line becomes thinner than a pixel where the picture shrinks.
    shrinking = min(lines.shape[0] / height, lines.shape[1] / width)
    lines = dilate(lines, math.ceil(shrinking))
    return (resize_to_cover(lines[None, None], height, width)[0, 0] > 0.5).float()


def _ink(picture: Tensor) -> Tensor:
    """(1,3,H,W) in [-1,1] -> contrast to the canvas, (H,W) in [0,1]: the largest over the channels, so that yellow counts."""
    canvas = _median(picture[0].flatten(1))[:, None, None]
    return (picture[0] - canvas).abs().amax(dim=0) / 2


def _median(rows: Tensor) -> Tensor:
    """The median of each row, (C,N) -> (C,); of an even number the lower one."""
    if rows.is_cuda:  # where `median` gives each row one of a hundred multiprocessors
        return rows.sort(dim=1).values[:, (rows.shape[1] - 1) // 2]
    return rows.median(dim=1).values


def redraw(lines: Tensor, thickness: int) -> Tensor:
    """Lines (H,W) redrawn around their centre lines, `thickness` pixels wide; one more where a centre lies between pixels."""
    middle = torch.zeros_like(lines)
    while lines.any():  # morphological skeleton: the difference to an opening, at each erosion
        smaller = erode(lines, 3)
        middle = torch.maximum(middle, lines - torch.minimum(lines, dilate(smaller, 3)))
        lines = smaller
    # The skeleton has gaps of a pixel, which the first 3 x 3 closes.
    return dilate(erode(dilate(middle, 3), 3), thickness)


def to_scribble(edges: Tensor, thickness: int, *, sigma: float = 3.0) -> Tensor:
    """Soft edges (H,W) in [0,1], of a HED network, to lines that look drawn by hand: 1 and 0.

    Only ridges are kept and then smeared, as in the published control data (NVlabs/Sana), whose lines `thickness` varies: 0
    thins them by a 4 x 4 erosion, 1 leaves them, 2 and up widen them by half of it, in pixels. `sigma` (pixels) is the
    published one for pictures of 1024 px.

    Raises ValueError for a negative thickness.
    """
    if thickness < 0:
        raise ValueError(f"thickness must be 0 or more, got: {thickness}")
    smooth = blur(edges, sigma)
    ridge = torch.zeros_like(edges, dtype=torch.bool)
    for kernel in _LINES:
        windows = F.unfold(padded(smooth, 1), 3)[0].view(9, *edges.shape)
        ridge |= smooth >= windows[list(kernel)].amax(dim=0)
    ridge &= smooth > 127 / 255
    lines = (blur(ridge.float(), sigma) > 4 / 255).float()
    if thickness == 0:
        return erode(lines, 4)
    return dilate(lines, thickness // 2) if thickness > 1 else lines


# The cells of a 3 x 3 window, numbered row by row, that lie on each of four lines through its middle.
_LINES = ((3, 4, 5), (1, 4, 7), (0, 4, 8), (2, 4, 6))
