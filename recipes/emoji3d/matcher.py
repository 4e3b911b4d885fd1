"""Finds wanted things in a picture by their known artwork, and says how well each fits.

Everything is at 128 pixels, whatever the picture's size. A thing is put where it lowers the squared error most: first
for all places at half the resolution and a dozen sizes at once, by Fourier transforms, then pixel by pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, floor

import numpy as np
import torch
from torch import Tensor, nn

from recipes.emoji3d.artwork import sprite
from recipes.emoji3d.background_finder import SIDE
from recipes.emoji3d.scenes import Kind

_COARSE = SIDE // 2
_SIZES = tuple(round(0.22 * SIDE * 1.12**step) for step in range(14))
_SHIFT = 3  # pixels that the exact place may be from the coarse one
_RESIZE = (0.9, 0.93, 0.96, 0.98, 1.0, 1.02, 1.04, 1.07, 1.1)
_APART = 0.33  # of the sum of two sizes: centres of two things are further from each other
_NOISE = 8.0 / 255  # error of a pixel that says nothing


@dataclass(frozen=True, slots=True)
class Place:
    """One thing found: its kind, its centre and longer side in units of the picture's side, and how well it fits.

    `fit` is the part of the artwork's change that the picture has, from 1 down, of its worst half (left, right, upper,
    lower); 1 less a tenth for every 10 levels that the mean colour is off.
    """

    kind: Kind
    x: float
    y: float
    size: float
    fit: float


@dataclass(frozen=True, slots=True)
class Layout:
    """The places of the wanted things in a picture, `error` the squared error that is left, and `leftover` its worst patch.

    `canvas` is the picture that the things and the background make, fp32 (3,SIDE,SIDE) in [0,1]; `leftover` in
    levels. `behind` has, for each thing, what the canvas was before it.
    """

    places: tuple[Place, ...]
    style: str
    canvas: Tensor
    behind: tuple[Tensor, ...]
    error: float
    leftover: float


@dataclass(frozen=True, slots=True)
class _Spot:
    """An artwork of some size with its top left corner at a pixel."""

    kind: Kind
    size: int
    left: int
    top: int


def locate(picture: Tensor, background: Tensor, kinds: Sequence[Kind], style: str) -> Layout:
    """Puts things of these kinds where they lower the error most, one after the other.

    Args:
        picture: fp32 (3,SIDE,SIDE) in [0,1].
        background: the same, without the things.
        kinds: one for each thing; equal ones are as many things.
        style: of the artwork.
    """
    left = list(kinds)
    canvas, spots, behind = background, list[_Spot](), list[Tensor]()
    while left:
        spot = _best(picture, canvas, sorted(set(left), key=left.index), style, spots)
        if spot is None:
            break
        left.remove(spot.kind)
        behind.append(canvas)
        spots.append(spot)
        canvas = _drawn(spot, canvas, style)
    rest = picture - canvas
    places = tuple(
        _place(spot, before, rest, style, picture.device) for spot, before in zip(spots, behind, strict=True)
    )
    return Layout(
        places,
        style,
        canvas,
        tuple(behind),
        float(rest.square().sum()),
        _leftover(spots, rest, style),
    )


@lru_cache(maxsize=4096)
def layers(kind: Kind, style: str, size: int, device: torch.device) -> Tensor:
    """Opacity times colour, then opacity: fp32 (4,h,w) in [0,1]."""
    drawn = sprite(kind.concept.emoji, style, kind.hue, size, side=SIDE)
    pixels = torch.from_numpy(np.array(drawn, dtype=np.float32) / 255).permute(2, 0, 1)
    return torch.cat([pixels[:3] * pixels[3:], pixels[3:]]).to(device)


@dataclass(frozen=True, slots=True)
class _Spectra:
    """An artwork in all sizes at half the resolution.

    `transforms` are conjugated, complex (Z,8,S,S/2+1), of opacity times colour (3), opacity, opacity squared times
    colour (3), opacity squared; `energy` (Z) is the squared sum of the first; `allowed` (Z,S,S) says which centres
    keep the thing inside.
    """

    transforms: Tensor
    energy: Tensor
    allowed: Tensor


@lru_cache(maxsize=96)
def _spectra(kind: Kind, style: str, device: torch.device) -> _Spectra:
    canvases, allowed = [], []
    for size in _SIZES:
        art = layers(kind, style, size, torch.device("cpu"))
        height, width = art.shape[1:]
        canvas = torch.zeros(4, SIDE, SIDE)
        top, left = (SIDE - height) // 2, (SIDE - width) // 2
        canvas[:, top : top + height, left : left + width] = art
        canvases.append(nn.functional.avg_pool2d(canvas, 2))
        reach = torch.tensor([height / 4, width / 4]) - 2  # a little may be outside
        center = torch.arange(_COARSE) + 0.5
        inside = [(center >= each) & (center <= _COARSE - each) for each in reach]
        allowed.append(inside[0][:, None] & inside[1][None])
    painted = torch.stack(canvases)
    opacity = painted[:, 3:]
    stacked = torch.cat([painted, painted[:, :3] * opacity, opacity.square()], 1)
    transforms = torch.fft.rfft2(torch.fft.ifftshift(stacked, dim=(-2, -1))).conj_physical()
    energy = painted[:, :3].square().sum((1, 2, 3))
    return _Spectra(transforms.to(device), energy.to(device), torch.stack(allowed).to(device))


def _best(
    picture: Tensor, canvas: Tensor, kinds: Sequence[Kind], style: str, taken: Sequence[_Spot]
) -> _Spot | None:
    """The place of largest gain of any of the kinds."""
    small, under = (nn.functional.avg_pool2d(each, 2) for each in (picture, canvas))
    rest = small - under
    inputs = torch.cat(
        [2 * rest, -2 * (rest * under).sum(0, keepdim=True), 2 * under, -under.square().sum(0, keepdim=True)]
    )
    transformed = torch.fft.rfft2(inputs)
    best: tuple[float, Kind, int, int, int] | None = None
    for kind in kinds:
        known = _spectra(kind, style, picture.device)
        gains = torch.fft.irfft2((known.transforms * transformed).sum(1), s=(_COARSE, _COARSE))
        gains = gains - known.energy[:, None, None]
        gains = gains.masked_fill(~(known.allowed & _free(taken, picture.device)), -torch.inf)
        index = int(gains.argmax())
        gain, place = float(gains.flatten()[index]), np.unravel_index(index, gains.shape)
        if gain > -np.inf and (best is None or gain > best[0]):
            best = (gain, kind, int(place[0]), int(place[1]), int(place[2]))
    if best is None:
        return None
    _, kind, z, y, x = best
    return _refine(picture, canvas, kind, style, _SIZES[z], 2 * x, 2 * y)


def _free(taken: Sequence[_Spot], device: torch.device) -> Tensor:
    """Masks the coarse centres (Z,S,S) that are far enough from the things placed already."""
    free = torch.ones(len(_SIZES), _COARSE, _COARSE, dtype=torch.bool, device=device)
    y, x = torch.meshgrid(*[torch.arange(_COARSE, device=device)] * 2, indexing="ij")
    for spot in taken:
        distance = torch.hypot(x - (spot.left + spot.size / 2) / 2, y - (spot.top + spot.size / 2) / 2)
        for z, size in enumerate(_SIZES):
            free[z] &= distance >= _APART * (size + spot.size) / 2
    return free


def _refine(picture: Tensor, canvas: Tensor, kind: Kind, style: str, size: int, x: int, y: int) -> _Spot:
    """The best exact place and size near a coarse one, whose centre is (x, y)."""
    best: tuple[float, _Spot] | None = None
    for each in sorted({round(size * factor) for factor in _RESIZE}):
        art = layers(kind, style, each, picture.device)
        height, width = art.shape[1:]
        if max(height, width) > SIDE:
            continue
        tops = _range(y - height / 2, SIDE - height)
        lefts = _range(x - width / 2, SIDE - width)
        window = (
            slice(None),
            slice(tops[0], tops[-1] + height),
            slice(lefts[0], lefts[-1] + width),
        )
        under = canvas[window]
        rest = picture[window] - under
        inputs = torch.cat(
            [
                2 * rest,
                -2 * (rest * under).sum(0, keepdim=True),
                2 * under,
                -under.square().sum(0, keepdim=True),
            ]
        )
        kernel = torch.cat([art, art[:3] * art[3:], art[3:].square()])
        gains = nn.functional.conv2d(inputs[None], kernel[None])[0, 0] - art[:3].square().sum()
        index = int(gains.argmax())
        row, column = divmod(index, gains.shape[1])
        gain = float(gains[row, column])
        if best is None or gain > best[0]:
            best = (gain, _Spot(kind, each, lefts[column], tops[row]))
    assert best is not None  # the coarse size itself fits
    return best[1]


def _range(middle: float, most: int) -> range:
    """Whole numbers near the middle, from 0 to `most`; at least one."""
    low, high = floor(middle) - _SHIFT, ceil(middle) + _SHIFT
    low, high = min(max(low, 0), most), min(max(high, 0), most)
    return range(low, high + 1)


def _box(spot: _Spot, art: Tensor) -> tuple[slice, slice]:
    return slice(spot.top, spot.top + art.shape[1]), slice(spot.left, spot.left + art.shape[2])


def _drawn(spot: _Spot, canvas: Tensor, style: str) -> Tensor:
    """The canvas with the thing on it."""
    art = layers(spot.kind, style, spot.size, canvas.device)
    rows, columns = _box(spot, art)
    changed = canvas.clone()
    changed[:, rows, columns] = canvas[:, rows, columns] * (1 - art[3:]) + art[:3]
    return changed


def _place(spot: _Spot, before: Tensor, rest: Tensor, style: str, device: torch.device) -> Place:
    art = layers(spot.kind, style, spot.size, device)
    rows, columns = _box(spot, art)
    wanted = art[:3] - before[:, rows, columns] * art[3:]
    missed = rest[:, rows, columns]
    height, width = art.shape[1:]
    halves = (
        (slice(None), slice(0, ceil(width / 2))),
        (slice(None), slice(width // 2, None)),
        (slice(0, ceil(height / 2)), slice(None)),
        (slice(height // 2, None), slice(None)),
    )
    blurred = [_blur(each).square().sum(0) for each in (wanted, missed)]
    fits = []
    for half in halves:
        noise = 3 * _NOISE**2 * blurred[0][half].numel()
        fits.append(1 - float(blurred[1][half].sum() / (blurred[0][half].sum() + noise)))
    color = (missed * art[3:]).sum((1, 2)).norm() / art[3:].sum() * 255
    fit = min(*fits, 1 - float(color) / 100)
    return Place(
        spot.kind,
        (spot.left + width / 2) / SIDE,
        (spot.top + height / 2) / SIDE,
        spot.size / SIDE,
        fit,
    )


def _blur(pixels: Tensor) -> Tensor:
    """(C,h,w) blurred a little, as outlines may be a pixel off."""
    return nn.functional.avg_pool2d(pixels[None], 3, stride=1, padding=1, count_include_pad=False)[0]


def _leftover(spots: Sequence[_Spot], rest: Tensor, style: str) -> float:
    """Root mean square error in levels of the worst patch of 10 x 10 pixels off all things."""
    covered = torch.zeros(1, SIDE, SIDE, device=rest.device)
    for spot in spots:
        art = layers(spot.kind, style, spot.size, rest.device)
        covered[(slice(None), *_box(spot, art))] += art[3:]
    # An outline may be off by 4 pixels.
    free = nn.functional.max_pool2d(covered, 9, stride=1, padding=4) < 0.1
    patches = nn.functional.avg_pool2d(rest.square().mean(0, keepdim=True) * free, 10, stride=1)
    return float(patches.max().sqrt()) * 255
