"""Running a network over overlapping tiles of a grid and blending the results: big pictures in little memory.

DC-AE's linear attention looks at its whole input, so neighbouring tiles differ in tone where they overlap, not only
at their borders. Hence wide feathered overlaps, and tiles of one full size only: they are spread evenly from edge
to edge, never leaving a sliver that would see too little of the picture. Everything here counts in latent cells,
of `step` pixels each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from .layers import wide_dtype


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Tile height and width, and the least overlap of neighbours along each; in latent cells."""

    tile: tuple[int, int]
    overlap: tuple[int, int]

    @classmethod
    def from_pixels(cls, tile: tuple[int, int], overlap: tuple[int, int], step: int) -> Tiling:
        """Sizes given in pixels, of which a cell has `step`; ValueError where they do not fit the grid."""
        for axis, size, shared in zip(("height", "width"), tile, overlap, strict=True):
            if size < step or size % step:
                raise ValueError(f"tile {axis} must be a positive multiple of {step} pixels; got {size}")
            if not 0 <= shared < size or shared % step:
                raise ValueError(
                    f"tile overlap along the {axis} must be a multiple of {step} from 0 to {size - step} pixels, "
                    f"less than the tile's {size}; got {shared}"
                )
        return cls(tile=(tile[0] // step, tile[1] // step), overlap=(overlap[0] // step, overlap[1] // step))


def run_tiled(
    network: Callable[[Tensor], Tensor], x: Tensor, tiling: Tiling, *, in_step: int, out_step: int
) -> Tensor:
    """`network(x)` from overlapping tiles of `x` (B,C,H*in_step,W*in_step) -> (B,C',H*out_step,W*out_step).

    The result's memory is one buffer in fp32 (fp64 for fp64 outputs) that the tiles are added to. A grid of at
    most one tile goes through `network` as it is.
    """
    grid = (x.shape[2] // in_step, x.shape[3] // in_step)
    tile = (min(tiling.tile[0], grid[0]), min(tiling.tile[1], grid[1]))
    if tile == grid:
        return network(x)
    rows, columns = (tile_starts(*sizes) for sizes in zip(grid, tiling.tile, tiling.overlap, strict=True))
    down = feather(rows, tile[0], out_step).to(x.device, wide_dtype(x))
    across = feather(columns, tile[1], out_step).to(x.device, wide_dtype(x))
    canvas: Tensor | None = None
    for (row, row_weights), (column, column_weights) in product(
        zip(rows, down, strict=True), zip(columns, across, strict=True)
    ):
        out = network(_window(x, (row, column), tile, in_step))
        if canvas is None:  # how many channels and which dtype come out, only the network knows
            result_dtype = out.dtype
            canvas = out.new_zeros(*out.shape[:2], grid[0] * out_step, grid[1] * out_step, dtype=down.dtype)
        _window(canvas, (row, column), tile, out_step).add_(out * (row_weights[:, None] * column_weights))
    assert canvas is not None
    return canvas.to(result_dtype)


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """First cells of the fewest tiles that cover `size` cells with at least `overlap` shared, spread evenly.

    The first tile starts at 0 and the last one ends at `size`. A smaller `size` needs one tile.
    """
    if size <= tile:
        return [0]
    steps = math.ceil((size - tile) / (tile - overlap))
    return [i * (size - tile) // steps for i in range(steps + 1)]


def feather(starts: list[int], tile: int, step: int) -> Tensor:
    """Blending weights of each tile along one axis, (tiles, tile*step) in fp64: they add up to 1 at every pixel.

    From the picture's edges a weight is flat; over an overlap it falls as a raised cosine, whose slow start keeps
    a tile's own border, where the network had no neighbours to look at, out of sight.
    """
    length = tile * step
    first = torch.tensor(starts)[:, None] * step
    shared = length - first.diff(dim=0)  # pixels that each tile has in common with the next
    centres = torch.arange(length, dtype=torch.float64) + 0.5
    weights = centres.new_ones(len(starts), length)
    weights[:-1] *= _rise((length - centres) / shared)
    weights[1:] *= _rise(centres / shared)
    windows = first + torch.arange(length)
    total = centres.new_zeros((starts[-1] + tile) * step)
    total.index_put_((windows,), weights, accumulate=True)  # not 1 where three tiles meet
    return weights / total[windows]


def _rise(share: Tensor) -> Tensor:
    """sin^2 from 0 at 0 to 1 at 1 and beyond; a rise and its mirror image add up to 1."""
    return torch.sin(share.clamp(max=1) * (math.pi / 2)).square()


def _window(x: Tensor, start: tuple[int, int], tile: tuple[int, int], step: int) -> Tensor:
    height, width = tile
    return x.narrow(2, start[0] * step, height * step).narrow(3, start[1] * step, width * step)
