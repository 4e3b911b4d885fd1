"""Finds the emoji in a picture by matching the known artwork: which, where, how large, and how well each fits.

A picture is a flat background plus objects that do not overlap. Drawing one artwork (opacity a, colour c) on the
background b explains T = a(c - b) of the difference D between picture and background, and so lowers the picture's
squared error by 2<D, T> - |T|^2: its *gain*. One Fourier product per kind and size gives the gain at every place;
objects are then taken greedily. Half resolution is enough to tell all kinds apart and is robust to an autoencoder's blur.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from math import ceil

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from recipes.emoji import scenes
from recipes.emoji import vocabulary as words

KINDS = tuple(words.KINDS)
# Longer sides that are tried, in pixels, 6% apart. Where there are several objects, each has one of the first few.
SIZES = (44, 47, 50, 53, 56, 60, 64, 68, 72, 76, 81, 86, 91, 97)
_SMALL = 7
_MOST = 6  # objects looked for: two more than any caption names
_TRIES = 30  # places looked at for them
_APART = 0.7  # two objects' centres are at least this many mean sizes apart, in x or in y
_MIN_FIT = 0.5  # a place that shows less of an artwork is not taken for it
# Squared levels over all pixels and channels. The faintest artwork of all, a bicycle on gray, is worth 130,000.
_MIN_GAIN = 60_000.0
_NOISE = 6.0  # levels: what an autoencoder at 28 dB adds at half resolution
_MARGIN = 4  # half-resolution pixels around the picture, so that no artwork wraps around
_OUTSIDE = 2  # of them an artwork may reach into
_SIDE = scenes.SIZE // 2 + 2 * _MARGIN  # S in shape comments
# Of the gains, which are nearly all of the work.
_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, slots=True)
class Found:
    """A detected object: its kind, its centre and longer side in pixels, and its score.

    The score is the lesser of two. The explained part of the artwork's worst half (left, right, upper or lower): 1
    where it is exactly the artwork, about 0 where that half is missing, less where something else is in its place.
    And 1 less a hundredth for every level that the mean colour is off, as an RGB distance.
    """

    kind: str
    x: float
    y: float
    size: float
    score: float


@dataclass(frozen=True, slots=True)
class Finding:
    """The content of a picture: its objects (largest gain first), its background's RGB colour, and the unexplained rest.

    `leftover` is the difference from the background, in levels, in the worst patch of 10 x 10 pixels with no object.
    """

    objects: tuple[Found, ...]
    background: tuple[float, float, float]
    leftover: float


@dataclass(frozen=True, slots=True)
class _Kinds:
    """Precomputed terms of the gains of all K kinds in one size."""

    spectra: Tensor  # (4,K,S,S/2+1) complex: the layers' Fourier transforms, conjugated
    moments: Tensor  # (K,5): <ac, ac>, then <a, ac> of each colour, then <a, a>
    inside: Tensor  # (K,S,S) bool: whether the artwork centred there is inside the picture


@dataclass(frozen=True, slots=True)
class _Place:
    """One artwork, and the pixel of the padded half-resolution picture where its centre is."""

    kind: str
    size: int
    x: int
    y: int


def find(picture: np.ndarray) -> Finding:
    """Finds the objects in an RGB picture, uint8 (128,128,3)."""
    pixels = torch.from_numpy(picture.astype(np.float32)).permute(2, 0, 1)
    background = _background(pixels)
    difference = _shrink(pixels - background[:, None, None])
    places, rest = _greedy(difference, background, len(SIZES))
    if not places or places[0].size > SIZES[_SMALL - 1]:
        # Several small objects can pass for a large one and the other way round: the smaller error decides.
        small, other_rest = _greedy(difference, background, _SMALL)
        if other_rest.square().sum() < rest.square().sum():
            places, rest = small, other_rest
    red, green, blue = background.tolist()
    objects = tuple(_describe(place, rest, background) for place in places)
    return Finding(objects, (red, green, blue), _leftover(places, rest))


def _background(pixels: Tensor) -> Tensor:
    """The commonest colour at the edge of a (3,H,W) picture: the median of the edge nearest to one known background."""
    sides = (pixels[:, :3], pixels[:, -3:], pixels[:, :, :3], pixels[:, :, -3:])
    edge = torch.cat([side.flatten(1) for side in sides], 1).T  # (P,3)
    known = torch.tensor(list(words.BACKGROUNDS.values()), dtype=torch.float32)
    nearest = torch.cdist(edge, known).argmin(1)
    return edge[nearest == nearest.bincount().argmax()].median(0).values


def _shrink(layers: Tensor) -> Tensor:
    """Halves the resolution of (C,128,128), smooths a little (places are whole pixels) and pads: (C,S,S)."""
    kernel = torch.tensor([0.25, 0.5, 0.25])
    halved = nn.functional.avg_pool2d(layers, 2)[:, None]
    framed = nn.functional.pad(halved, (1, 1, 1, 1), mode="replicate")
    smooth = nn.functional.conv2d(framed, (kernel[:, None] * kernel)[None, None])[:, 0]
    return nn.functional.pad(smooth, (_MARGIN,) * 4)


@lru_cache(maxsize=256)
def _layers(kind: str, size: int) -> Tensor:
    """Opacity times colour, then opacity, at half resolution and centred on pixel S/2: (4,S,S)."""
    sprite = scenes.artwork(kind, size)
    canvas = Image.new("RGBA", (scenes.SIZE, scenes.SIZE))
    canvas.paste(sprite, (round((scenes.SIZE - sprite.width) / 2), round((scenes.SIZE - sprite.height) / 2)))
    pixels = torch.from_numpy(np.array(canvas, dtype=np.float32)).permute(2, 0, 1)
    opacity = pixels[3:] / 255
    return _shrink(torch.cat([opacity * pixels[:3], opacity]))


def _reach(kind: str, size: int) -> tuple[float, float]:
    """Half of an artwork's width and of its height, in half-resolution pixels."""
    sprite = scenes.artwork(kind, size)
    return sprite.width / 4, sprite.height / 4


@cache
def _kinds_of(size: int) -> _Kinds:
    layers = torch.stack([_layers(kind, size) for kind in KINDS])
    painted, opacity = layers[:, :3], layers[:, 3:]
    squares = [part.square().sum((1, 2, 3))[:, None] for part in (painted, opacity)]
    moments = torch.cat([squares[0], (painted * opacity).sum((2, 3)), squares[1]], 1)
    spectra = torch.fft.rfft2(torch.fft.ifftshift(layers, dim=(-2, -1))).conj_physical().transpose(0, 1)
    reach = torch.tensor([_reach(kind, size) for kind in KINDS])[:, :, None]
    center = torch.arange(_SIDE) - float(_MARGIN)
    fits = (center >= reach - _OUTSIDE) & (center <= scenes.SIZE / 2 + _OUTSIDE - reach)  # (K,2,S): x, y
    inside = fits[:, 1, :, None] & fits[:, 0, None, :]
    return _Kinds(*(part.to(_DEVICE) for part in (spectra.contiguous(), moments, inside)))


def _greedy(difference: Tensor, background: Tensor, sizes: int) -> tuple[list[_Place], Tensor]:
    """Takes the place of largest gain, subtracts it, and so on; also returns the difference that is left.

    Only the first object may be large; it has one of the first `sizes` sizes.
    """
    rest = difference
    places: list[_Place] = []
    gains, kinds = _gains(rest, background, sizes)
    for _ in range(_TRIES):
        z, y, x = (int(i) for i in np.unravel_index(int(gains.argmax()), gains.shape))
        if gains[z, y, x] < _MIN_GAIN or len(places) == _MOST:
            break
        place = _Place(KINDS[int(kinds[z, y, x])], SIZES[z], x, y)
        after = rest - _drawn(place, background)
        if _fits(place, after, background)[0] < _MIN_FIT:
            _clear(gains[z], y, x, 1)
            continue
        rest = after
        places.append(place)
        gains, kinds = _gains(rest, background, _SMALL)
        for taken in places:
            for plane, size in zip(gains, SIZES, strict=False):
                _clear(plane, taken.y, taken.x, round(_APART * (taken.size + size) / 4))
    return places, rest


def _gains(rest: Tensor, background: Tensor, sizes: int) -> tuple[Tensor, Tensor]:
    """For the first sizes (z) and every place, the largest gain (z,S,S) of any kind, and that kind's number (z,S,S)."""
    against = (background[:, None, None] * rest).sum(0, keepdim=True)
    inputs = torch.fft.rfft2(torch.cat([rest, -against]).to(_DEVICE))  # <D, T> = <D, ac> - <bD, a>
    weights = torch.cat([torch.ones(1), -2 * background, background.square().sum()[None]]).to(_DEVICE)
    gains = torch.empty(sizes, _SIDE, _SIDE, device=_DEVICE)
    kinds = torch.empty(sizes, _SIDE, _SIDE, dtype=torch.long, device=_DEVICE)
    for z, size in enumerate(SIZES[:sizes]):
        every = _kinds_of(size)
        product = every.spectra[0] * inputs[0]
        for spectrum, channel in zip(every.spectra[1:], inputs[1:], strict=True):
            product.addcmul_(spectrum, channel)
        energy = every.moments @ weights
        gain = torch.fft.irfft2(product, s=(_SIDE, _SIDE)).mul_(2).sub_(energy[:, None, None])
        torch.max(gain.mul_(every.inside), 0, out=(gains[z], kinds[z]))
    return gains.cpu(), kinds.cpu()


def _clear(plane: Tensor, y: int, x: int, radius: int) -> None:
    plane[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1] = 0


def _drawn(place: _Place, background: Tensor) -> Tensor:
    """T (3,S,S): what the artwork changes there."""
    layers = _layers(place.kind, place.size)
    change = layers[:3] - background[:, None, None] * layers[3]
    return _at(place, change)


def _at(place: _Place, centered: Tensor) -> Tensor:
    return torch.roll(centered, (place.y - _SIDE // 2, place.x - _SIDE // 2), (-2, -1))


def _fits(place: _Place, rest: Tensor, background: Tensor) -> list[float]:
    """Computes the visible share of the artwork: of all of it, and of its left, right, upper and lower halves."""
    wide, high = _reach(place.kind, place.size)
    left, right = max(0, int(place.x - wide)), ceil(place.x + wide)
    top, bottom = max(0, int(place.y - high)), ceil(place.y + high)
    wanted, missed = (t.square().sum(0) for t in (_drawn(place, background), rest))
    boxes = (
        (top, bottom, left, right),
        (top, bottom, left, place.x),
        (top, bottom, place.x, right),
        (top, place.y, left, right),
        (place.y, bottom, left, right),
    )
    fits = []
    for y0, y1, x0, x1 in boxes:
        noise = 3 * _NOISE**2 * (y1 - y0) * (x1 - x0)
        fits.append(1 - float(missed[y0:y1, x0:x1].sum() / (wanted[y0:y1, x0:x1].sum() + noise)))
    return fits


def _leftover(places: list[_Place], rest: Tensor) -> float:
    covered = torch.zeros(1, _SIDE, _SIDE)
    for place in places:
        covered += _at(place, _layers(place.kind, place.size)[3:])
    free = (
        nn.functional.max_pool2d(covered, 5, stride=1, padding=2) < 0.1
    )  # an outline may be off by 4 pixels
    return float(
        nn.functional.avg_pool2d(rest.square().mean(0, keepdim=True) * free, 5, stride=1).max().sqrt()
    )


def _describe(place: _Place, rest: Tensor, background: Tensor) -> Found:
    opacity = _at(place, _layers(place.kind, place.size)[3:])
    color_error = (rest * opacity).sum((1, 2)).norm() / opacity.sum()
    score = min(*_fits(place, rest, background)[1:], 1 - float(color_error) / 100)
    return Found(place.kind, 2.0 * (place.x - _MARGIN), 2.0 * (place.y - _MARGIN), float(place.size), score)
