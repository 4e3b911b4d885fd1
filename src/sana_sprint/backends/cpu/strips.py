"""Evaluating big grids in small memory, on a CPU and without gradients.

A new tensor of many megabytes costs more than the arithmetic on it: the kernel zeroes each of its pages at the first
touch. So operations on single pixels run in pieces that stay in a core's cache and write over their input, and
convolutions run in strips of rows whose memory is used again. The numbers are the same, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana_sprint.models.layers import autocast_dtype

PIECE = 1 << 19  # elements of a piece: 2 MiB in fp32, shared by the cores
STRIP = 1 << 24  # bytes of a strip: malloc keeps blocks of less than 32 MiB for the next one


def is_inference(x: Tensor) -> bool:
    """Whether operations may be replaced by others with the same result, up to rounding.

    Not where gradients are wanted, nor under autocast, whose casts go by operation.
    """
    return not torch.is_grad_enabled() and autocast_dtype(x.device) is None


def is_cpu_inference(x: Tensor) -> bool:
    """`is_inference` on a CPU, outside compilers: these get whole operations, which they fuse themselves."""
    return x.device.type == "cpu" and is_inference(x) and not torch.compiler.is_compiling()


def needs_pieces(x: Tensor) -> bool:
    """Whether an array is so large that working in pieces pays."""
    return is_cpu_inference(x) and x.numel() > PIECE


def pieces(x: Tensor) -> Iterator[slice]:
    """Consecutive slices of the rows of x (N,...), each of `PIECE` elements or of one row."""
    rows = max(1, PIECE // x.shape[1:].numel())
    return (slice(first, first + rows) for first in range(0, len(x), rows))


def over_rows(
    function: Callable[..., Tensor], target: Tensor, *others: Tensor, out: Tensor | None = None
) -> Tensor:
    """`function` of arrays (B,N,...,C) -> (B,N,...,C), which sees each of the N rows by itself.

    The result has the size of `target`, which the caller no longer needs: in pieces, the result is written over it. Or
    into `out`, which may be one of the others.
    """
    if not needs_pieces(target):
        made = function(target, *others)
        return made if out is None else out.copy_(made)
    result = target if out is None else out
    for places, *pictures in zip(result, target, *others, strict=True):
        for rows in pieces(places):
            piece, *more = (x[rows] for x in pictures)
            made = function(piece, *more)
            if out is not None or made is not piece:  # else it was written over
                places[rows] = made
    return result


def over_pixels(
    function: Callable[..., Tensor], target: Tensor, *others: Tensor, out: Tensor | None = None
) -> Tensor:
    """`over_rows` of grids (B,C,H,W) -> (B,C,H,W), whose channels `function` finds along the last axis."""
    pixels = (x.movedim(1, -1) for x in (target, *others))
    place = None if out is None else out.movedim(1, -1)
    return over_rows(function, *pixels, out=place).movedim(-1, 1)


def needs_strips(x: Tensor, channels: int) -> bool:
    """Whether grids of `x`'s height and width and of `channels` are so large that `by_strips` pays."""
    return is_cpu_inference(x) and x.shape[2] * x.shape[3] * x.element_size() * channels > 2 * STRIP


def by_strips(
    rows: Callable[[Tensor, int, int, Tensor], object],
    x: Tensor,
    channels: int,
    *,
    margin: int,
    may_overwrite: bool = False,
) -> Tensor:
    """A result of `x`'s shape from `rows(strip, first, end, out)`, which writes the strip's rows from first to end - 1.

    A strip (1,C,h,W) has `margin` more rows of x above and below those, or as many as there are.
    `channels` says how many its largest intermediate grid has. `may_overwrite` says that nobody else needs x.
    """
    height = x.shape[2]
    result = x if may_overwrite else torch.empty_like(x)
    for picture, out in zip(x.chunk(len(x)), result.chunk(len(x)), strict=True):
        above = picture[:, :, :0]  # rows of x which the result took the place of and the next strip must see
        for first, end in strips(height, x.shape[3] * x.element_size() * channels):
            top, bottom = max(0, first - margin), min(end + margin, height)
            finished = out[:, :, first - above.shape[2] : first]
            kept = finished.clone()
            finished.copy_(above)
            if may_overwrite:
                above = picture[:, :, max(0, end - margin) : end].clone()
            rows(picture[:, :, top:bottom], first - top, end - top, out[:, :, first:end])
            finished.copy_(kept)
    return result


def strips(height: int, row: int) -> Iterator[tuple[int, int]]:
    """(first, end) of consecutive strips of rows of `row` bytes."""
    rows = max(1, STRIP // row)
    for first in range(0, height, rows):
        yield first, min(first + rows, height)


def window_rows(x: Tensor, first: int, end: int) -> Tensor:
    """Rows first to end - 1 of a grid (B,C,H,W), with zeros for those beyond its edges."""
    above, below = max(0, -first), max(0, end - x.shape[2])
    window = x[:, :, max(0, first) : end]
    return F.pad(window, (0, 0, above, below)) if above or below else window


def convolve_rows(conv: Any, x: Tensor, first: int, end: int) -> Tensor:
    """Rows first to end - 1 of `conv(x)`, for a 3x3 kernel padded by 1 with zeros; or a quantised layer in its place."""
    window = window_rows(x, first - 1, end + 1)
    if isinstance(conv, nn.Conv2d):
        return F.conv2d(window, conv.weight, conv.bias, padding=(0, 1), groups=conv.groups)
    rows: Tensor = conv.convolve(window, padding=(0, 1))
    return rows
