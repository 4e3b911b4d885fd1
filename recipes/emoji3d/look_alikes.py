"""Whether another thing of the world fits a place better than the one that was looked for."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from recipes.emoji3d.artwork import HUES, takes_hue
from recipes.emoji3d.background_finder import SIDE
from recipes.emoji3d.concepts import concepts, named, tier_of
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
    kind = place.kind
    own = _gains(picture, behind, place, _prepared((Kind(kind.concept, kind.hue),), style, picture.device))
    rivals = _rivals(kind.concept.name, kind.hue, style)
    gains = _gains(picture, behind, place, _prepared(rivals, style, picture.device))
    margin = _MARGIN * _change(
        behind, place, _prepared((Kind(kind.concept, kind.hue),), style, picture.device)
    )
    best = int(gains.argmax())
    return rivals[best] if float(gains[best]) > float(own[0]) + margin else None


def _gains(picture: Tensor, behind: Tensor, place: Place, art: Tensor) -> Tensor:
    """How much each of K artworks (K,4,s,s) lowers the squared error there, at the best zoom: (K)."""
    found = []
    for zoom in _ZOOMS:
        shown, under = (_square(each, place, zoom) for each in (picture, behind))
        change = art[:, :3] - art[:, 3:] * under
        found.append(
            (2 * (change * (shown - under)).sum((1, 2, 3)) - change.square().sum((1, 2, 3))) * zoom**2
        )
    return torch.stack(found).amax(0)


def _change(behind: Tensor, place: Place, art: Tensor) -> float:
    """The squared sum of what an artwork (1,4,s,s) changes there."""
    under = _square(behind, place, 1.0)
    return float((art[:, :3] - art[:, 3:] * under).square().sum())


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


@lru_cache(maxsize=512)
def _rivals(name: str, hue: str | None, style: str) -> tuple[Kind, ...]:
    own = named(name)
    others = [concept for concept in concepts(tier_of(own)) if concept != own]
    rivals = [Kind(concept) for concept in others]
    if hue is not None:
        rivals += [Kind(concept, hue) for concept in others if takes_hue(concept.emoji, style)]
    if takes_hue(own.emoji, style):
        rivals += [Kind(own, each) for each in HUES if each != hue]
    return tuple(rivals) if hue is None else (Kind(own), *rivals)


@lru_cache(maxsize=64)
def _prepared(kinds: tuple[Kind, ...], style: str, device: torch.device) -> Tensor:
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
