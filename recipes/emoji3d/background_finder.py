"""Finds the background of a picture among all that the world can draw."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from recipes.emoji3d.backgrounds import COLORS, PATTERNS, Background, mask, num_variants

SIDE = 128  # pixels, of the pictures that are looked at
_NAMES = tuple(COLORS)
_NEAR = 46.0 / 255  # half of the distance of the nearest two colours
_CLEAR = 0.04  # of a mask's range, that counts as one of its colours
_ENDS = 0.12  # of a gradient's
_EDGE, _EDGE_WEIGHT = 8, 4.0  # pixels from the picture's edge, and how much more they count
_PLAIN_BONUS = 0.03  # part of the picture by which a pattern must explain more than a plain colour does


@dataclass(frozen=True, slots=True)
class FoundBackground:
    """The nearest background, what it would look like, fp32 (3,SIDE,SIDE) in [0,1], and the (weighted) part of pixels it explains."""

    background: Background
    pixels: Tensor
    explained: float


def find_background(picture: Tensor) -> FoundBackground:
    """Finds the background of an fp32 (3,SIDE,SIDE) picture in [0,1], objects or not in front of it."""
    masks, patterns, is_gradient = _masks(picture.device)
    colors, weights = _colors(picture.device), _weights(picture.device)
    # Every other pixel of every other row says enough.
    flat = picture[:, ::2, ::2].flatten(1).T  # (P,3)
    distances = torch.cdist(flat, colors)  # (P,N)
    votes = torch.nn.functional.one_hot(distances.argmin(1), len(_NAMES)).float()
    votes *= (distances.amin(1, keepdim=True) < _NEAR).float() * weights[:, None]
    margin = torch.where(is_gradient, _ENDS, _CLEAR)[:, None]
    first = ((masks < margin).float() @ votes).argmax(
        1
    )  # (M): the commonest colour where the mask has its first
    second = ((masks > 1 - margin).float() @ votes).argmax(1)
    second[0] = first[0]
    drawn = colors[first][:, None] + masks[..., None] * (colors[second] - colors[first])[:, None]  # (M,P,3)
    explained = ((drawn - flat).norm(dim=2) < _NEAR).float() @ (weights / weights.sum())
    explained[0] += _PLAIN_BONUS
    explained[1:][first[1:] == second[1:]] = 0
    best = int(explained.argmax())
    pattern, variant = patterns[best]
    names = _NAMES[int(first[best])], _NAMES[int(second[best])]
    found = Background(names[0], names[1], pattern, variant) if pattern else Background(names[0])
    pixels = _refined(
        picture, _mask(pattern, variant, picture.device), colors[first[best]], colors[second[best]]
    )
    return FoundBackground(
        found, pixels.view_as(picture), float(explained[best]) - (best == 0) * _PLAIN_BONUS
    )


def _refined(picture: Tensor, blend: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The background (3,P) with its two colours as the picture has them: the least squares over pixels that are near."""
    flat = picture.flatten(1)
    drawn = first[:, None] + blend * (second - first)[:, None]
    near = ((flat - drawn).norm(dim=0) < _NEAR).float()
    basis = torch.stack([1 - blend, blend])  # (2,P)
    gram = (basis * near) @ basis.T + 1e-3 * torch.eye(2, device=picture.device)
    # Towards the drawn colours where too few pixels say otherwise.
    change = torch.linalg.solve(gram, (basis * near) @ (flat - drawn).T)  # (2,3)
    return drawn + (basis.T @ change).T


@cache
def _weights(device: torch.device) -> Tensor:
    """Of every other pixel (P): things seldom reach the edge, so more can be learnt there."""
    weights = torch.full((SIDE, SIDE), _EDGE_WEIGHT, device=device)
    weights[_EDGE:-_EDGE, _EDGE:-_EDGE] = 1
    return weights[::2, ::2].flatten()


@cache
def _colors(device: torch.device) -> Tensor:
    return torch.tensor(list(COLORS.values()), dtype=torch.float32, device=device) / 255


@lru_cache(maxsize=128)
def _mask(pattern: str | None, variant: int, device: torch.device) -> Tensor:
    """One mask at all pixels (SIDE SIDE)."""
    drawn = torch.from_numpy(mask(pattern, variant, SIDE).copy()) if pattern else torch.zeros(SIDE, SIDE)
    return drawn.flatten().to(device)


@cache
def _masks(device: torch.device) -> tuple[Tensor, list[tuple[str | None, int]], Tensor]:
    """All masks at every other pixel (M,P), the plain one first, their patterns and variants, and which are gradients."""
    kinds: list[tuple[str | None, int]] = [(None, 0)]
    kinds += [(pattern, variant) for pattern in PATTERNS for variant in range(num_variants(pattern))]
    drawn = [_mask(pattern, variant, device).view(SIDE, SIDE)[::2, ::2] for pattern, variant in kinds]
    is_gradient = torch.tensor([pattern == "gradient" for pattern, _ in kinds], device=device)
    return torch.stack(drawn).flatten(1), kinds, is_gradient
