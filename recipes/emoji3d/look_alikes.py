"""Whether another thing of the world fits a place better than the one that was looked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch
from torch import Tensor, nn

from recipes.emoji3d.artwork import HUES, takes_hue
from recipes.emoji3d.background_finder import SIDE
from recipes.emoji3d.concepts import Concept, concepts, tier_of
from recipes.emoji3d.matcher import Place, layers
from recipes.emoji3d.scenes import Kind

_SIDE = 32  # pixels, to which a thing's square is scaled
_ZOOMS = (0.94, 1.0, 1.06)  # another thing may fit best at a slightly other size
_MARGIN = 0.04  # of the thing's own change: by so much another one must fit better


def better_kind(picture: Tensor, place: Place, behind: Tensor, style: str) -> Kind | None:
    """The kind that fits the place clearly better than its own, or None.

    Compared with it are all concepts of its tier in its hue (those that have colour) and in their own colours, and
    the concept itself in all hues. Two kinds that look the same never beat each other by the margin.

    Args:
        picture: fp32 (3,SIDE,SIDE) in [0,1].
        place: where the thing is.
        behind: the picture that the background and the things placed before it make, of the same form.
        style: of the artwork.
    """
    kind, device = place.kind, picture.device
    views = [_View(*(_square(each, place, zoom) for each in (picture, behind)), zoom) for zoom in _ZOOMS]
    own_art = _stacked((replace(kind, size=None),), style, device)
    tier = tier_of(kind.concept)
    rivals = [_tier(tier, style, hue, device) for hue in dict.fromkeys((None, kind.hue))]
    rivals.append(_in_hues(kind.concept, style, device))
    under = views[_ZOOMS.index(1.0)].under
    own_change = float((own_art[0, :3] - own_art[0, 3:] * under).square().sum())
    bar = float(_gains(views, own_art)[0]) + _MARGIN * own_change
    best: tuple[float, Kind | None] = (bar, None)
    for kinds, art in rivals:
        if not kinds:
            continue
        gains = _gains(views, art)
        for index in gains.topk(min(2, len(kinds))).indices.tolist():
            rival = kinds[index]
            if (rival.concept, rival.hue) != (kind.concept, kind.hue) and float(gains[index]) > best[0]:
                best = float(gains[index]), rival
    return best[1]


@dataclass(frozen=True, slots=True)
class _View:
    """The square of a place as the picture shows it and without the thing, (3,s,s), and how much larger it is."""

    shown: Tensor
    under: Tensor
    zoom: float


def _gains(views: Sequence[_View], art: Tensor) -> Tensor:
    """How much each of K artworks (K,4,s,s) lowers the squared error in the best of the views: (K)."""
    found = []
    for view in views:
        # The error falls by 2 <d, t> - <t, t> with t = colour - opacity * under, written as products with fixed vectors.
        rest = view.shown - view.under
        weights = torch.cat([2 * rest, -2 * (rest * view.under).sum(0, keepdim=True)])
        change = art[:, :3] - art[:, 3:] * view.under
        gains = art.flatten(1) @ weights.flatten() - change.square().sum((1, 2, 3))
        found.append(gains * view.zoom**2)
    return torch.stack(found).amax(0)


def _square(pixels: Tensor, place: Place, zoom: float) -> Tensor:
    """The square around the place with its longer side times `zoom`, scaled: (3,s,s). Off the picture it is repeated."""
    half = place.size * zoom
    theta = torch.tensor([[[half, 0, 2 * place.x - 1], [0, half, 2 * place.y - 1]]], device=pixels.device)
    factor = max(1, int(place.size * SIDE / _SIDE))
    smooth = nn.functional.avg_pool2d(
        pixels[None], factor, stride=1, padding=factor // 2, count_include_pad=False
    )
    grid = nn.functional.affine_grid(theta, [1, 3, _SIDE, _SIDE], align_corners=False)
    return nn.functional.grid_sample(smooth, grid, padding_mode="border", align_corners=False)[0]


@cache
def _tier(tier: str, style: str, hue: str | None, device: torch.device) -> tuple[tuple[Kind, ...], Tensor]:
    """All concepts of a tier that can have the hue, and their artwork (K,4,s,s)."""
    every = concepts(tier)
    kinds = tuple(Kind(each, hue) for each in every if hue is None or takes_hue(each.emoji, style))
    return kinds, _stacked(kinds, style, device)


@lru_cache(maxsize=256)
def _in_hues(concept: Concept, style: str, device: torch.device) -> tuple[tuple[Kind, ...], Tensor]:
    """The concept in its own colours and in all hues, if it takes any, and its artwork."""
    hues = (None, *HUES) if takes_hue(concept.emoji, style) else (None,)
    kinds = tuple(Kind(concept, hue) for hue in hues)
    return kinds, _stacked(kinds, style, device)


def _stacked(kinds: Sequence[Kind], style: str, device: torch.device) -> Tensor:
    return torch.stack([canonical(kind, style) for kind in kinds]).to(device)


@lru_cache(maxsize=8192)
def canonical(kind: Kind, style: str) -> Tensor:
    """The artwork in the middle of a square that its longer side fills: (4,s,s), opacity times colour, opacity."""
    art = layers(kind, style, 2 * _SIDE, torch.device("cpu"))
    height, width = art.shape[1:]
    top, left = (2 * _SIDE - height) // 2, (2 * _SIDE - width) // 2
    canvas = torch.zeros(4, 2 * _SIDE, 2 * _SIDE)
    canvas[:, top : top + height, left : left + width] = art
    return nn.functional.avg_pool2d(canvas, 2)
