"""Backgrounds: plain colours, and two colours as a gradient, stripes, dots or checks.

A pattern is a mask with values from 0 (first colour) to 1 (second colour), one of few: so a judge can try them all.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np

from recipes.emoji import vocabulary

COLORS = vocabulary.BACKGROUNDS  # the nearest two are 92 levels apart, as an RGB distance
PATTERNS = ("gradient", "stripes", "dots", "checks")
_MIN_CONTRAST = 140.0  # levels between a pattern's two colours, as an RGB distance
_PERIODS = (4, 5, 6)  # repetitions across the picture


@dataclass(frozen=True, slots=True)
class Background:
    """The background behind the objects.

    `pattern` is None for one plain colour, and then `second` is None too. `variant` is the mask's number among the
    pattern's (direction, period, phase): captions leave it open.
    """

    first: str
    second: str | None = None
    pattern: str | None = None
    variant: int = 0


def sample_background(rng: random.Random, *, plain: float = 0.6) -> Background:
    """Draws a background: plain with that probability, else any pattern of two colours that are far apart."""
    first = rng.choice(list(COLORS))
    if rng.random() < plain:
        return Background(first)
    pattern = rng.choice(PATTERNS)
    second = rng.choice([name for name in COLORS if contrast(first, name) >= _MIN_CONTRAST])
    return Background(first, second, pattern, rng.randrange(num_variants(pattern)))


def contrast(first: str, second: str) -> float:
    """The RGB distance of two background colours, in levels."""
    return float(np.linalg.norm(np.subtract(COLORS[first], COLORS[second])))


def draw_background(background: Background, side: int) -> np.ndarray:
    """The background alone: uint8 (side, side, 3)."""
    first = np.array(COLORS[background.first], np.float32)
    if background.pattern is None or background.second is None:
        return np.full((side, side, 3), first, np.uint8)
    second = np.array(COLORS[background.second], np.float32)
    blend = mask(background.pattern, background.variant, side)[..., None]
    return np.asarray((first + (second - first) * blend).round().astype(np.uint8))


def num_variants(pattern: str) -> int:
    """How many masks a pattern has."""
    return len(_variants(pattern))


@lru_cache(maxsize=512)
def mask(pattern: str, variant: int, side: int) -> np.ndarray:
    """How much of the second colour each pixel has: float32 (side, side) in [0, 1].

    Gradients run from the first colour at the left or at the top to the second. Stripes are horizontal, vertical or
    diagonal. Dots have the second colour.
    """
    y, x = (np.mgrid[:side, :side] + 0.5) / side
    choice = _variants(pattern)[variant]
    if pattern == "gradient":
        return np.asarray(x if choice[0] else y, np.float32)
    direction, period, (phase_x, phase_y) = choice
    if pattern == "stripes":
        along = {0: x, 1: y, 2: (x + y) / 2**0.5, 3: (x - y) / 2**0.5}[direction]
        return _bands(along * period + phase_x, side / period)
    across, down = x * period + phase_x, y * period + phase_y
    if pattern == "checks":
        columns, rows = (_bands(place / 2, 2 * side / period) for place in (across, down))
        return columns * (1 - rows) + rows * (1 - columns)
    distance = np.hypot(across % 1 - 0.5, down % 1 - 0.5)
    return ((0.3 - distance) * side / period + 0.5).clip(0, 1).astype(np.float32)


def _bands(place: np.ndarray, pixels: float) -> np.ndarray:
    """Bands of 0 and 1 as wide as each other, one period for each unit of `place`, with edges one pixel soft."""
    return np.asarray(((np.abs(place % 1 - 0.5) - 0.25) * pixels + 0.5).clip(0, 1), np.float32)


@lru_cache(maxsize=8)
def _variants(pattern: str) -> list[tuple[int, int, tuple[float, float]]]:
    """Direction, repetitions across the picture, and phase in periods, of each of a pattern's masks."""
    quarters = (0.0, 0.25, 0.5, 0.75)
    if pattern == "gradient":
        return [(direction, 1, (0.0, 0.0)) for direction in (0, 1)]
    if pattern == "stripes":
        return [(d, period, (phase, 0.0)) for d, period, phase in product(range(4), _PERIODS, quarters)]
    if pattern == "dots":
        return [(0, period, phase) for period, phase in product(_PERIODS, product((0.0, 0.5), repeat=2))]
    # Half a period further, checks are the same with their colours exchanged.
    return [(0, period, (phase, 0.0)) for period, phase in product(_PERIODS, (0.0, 0.5, 1.0, 1.5))]
