"""Scenes: what is in a picture, where, how large, in which style and on what; and the picture itself.

GenEval's six tasks by name, and three more: style, size and pattern. Places and sizes are free. Everything is a pure
function of an integer seed. A fixed tenth of all combinations (`combinations`, `is_held_out`) never appears in the
training split: those judge the model.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations as pairs_of

import numpy as np
from PIL import Image

from recipes.emoji3d.artwork import HUES, STYLES, artwork, sprite, takes_hue
from recipes.emoji3d.backgrounds import COLORS, Background, draw_background, sample_background
from recipes.emoji3d.concepts import Concept, concepts

TASKS = ("single", "two", "counting", "color", "position", "attribution", "style", "size", "pattern")
# What stands where is the hardest to learn, and single things have the most detail: they come up more often.
_WEIGHTS = (22, 14, 12, 7, 26, 7, 2, 5, 5)
RELATIONS = ("left of", "right of", "above", "below")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
MAX_COUNT = 5
_SIZES = {1: (0.4, 0.95), 2: (0.3, 0.55), 3: (0.27, 0.4), 4: (0.26, 0.36), 5: (0.25, 0.32)}
_CORNER_SIZES = (0.3, 0.46)
# Of the picture's side: what "small" and "big" mean for one thing, and for two beside each other.
_SMALL, _BIG, _SMALL_OF_TWO, _BIG_OF_TWO = (0.27, 0.42), (0.72, 0.96), (0.25, 0.33), (0.5, 0.6)
_APART = 0.46  # of the sum of two sizes, at least so far are centres from each other: overlaps stay small
_OFFSET = 0.22  # between centres along a relation's axis
_MARGIN = 0.01
_HUE_RATE = 0.12  # of kinds whose hue the task leaves open
_VISIBLE = 0.55  # part of a thing that must stand out from each colour of its background
_VISIBLE_LEVELS = 60.0


@dataclass(frozen=True, slots=True)
class Kind:
    """The look of a thing: its concept, another hue or None, and "small", "big" or None for any size."""

    concept: Concept
    hue: str | None = None
    size: str | None = None


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: its kind, its centre and its longer side in units of the picture's side, from the top left."""

    kind: Kind
    x: float
    y: float
    size: float


@dataclass(frozen=True, slots=True)
class Scene:
    """The content of a picture.

    `relation` is one of `RELATIONS` between the first two things, "between" for the first among three, one of
    `CORNERS` for a single thing, or None. Equal kinds follow each other.
    """

    task: str
    style: str
    things: tuple[Thing, ...]
    background: Background
    relation: str | None

    @property
    def kinds(self) -> tuple[tuple[Kind, int], ...]:
        """Each kind once, in order, with the number of its things."""
        counts: dict[Kind, int] = {}
        for thing in self.things:
            counts[thing.kind] = counts.get(thing.kind, 0) + 1
        return tuple(counts.items())


def sample_scene(
    seed: int, *, tier: str = "everyday", held_out: bool = False, task: str | None = None
) -> Scene:
    """Draws the scene with number `seed`.

    Args:
        seed: any integer; equal arguments give equal scenes.
        tier: whose concepts, as `concepts.concepts` takes it.
        held_out: draw only scenes whose task's combination training never sees (True), or only scenes without any
            such combination (False).
        task: one of `TASKS`; None draws one.
    """
    rng = random.Random(f"scene3d-{seed}-{tier}-{held_out}-{task}")
    chosen = task or rng.choices(TASKS, weights=_WEIGHTS)[0]
    while True:
        scene = _draw(chosen, tier, rng)
        found = combinations(scene)
        if is_held_out(*found[0]) if held_out else not any(is_held_out(*each) for each in found):
            return scene


def combinations(scene: Scene) -> list[tuple[object, ...]]:
    """The combination of a scene, the one that its task is about first.

    A thing and what is behind it (of single things), a thing and its hue, a thing and its number, and two things.
    """
    kinds = scene.kinds
    found: list[tuple[object, ...]] = []
    found += [tuple(sorted(called(kind) for kind in two)) for two in pairs_of((k for k, _ in kinds), 2)]
    found += [(kind.concept.name, count) for kind, count in kinds if count > 1]
    hues: list[tuple[object, ...]] = [(kind.concept.name, kind.hue) for kind, _ in kinds if kind.hue]
    found = hues + found if scene.task == "color" else found + hues
    if len(scene.things) == 1:
        behind = (kinds[0][0].concept.name, scene.background.first, scene.background.pattern)
        found = [*found, behind] if scene.task == "color" else [behind, *found]
    return found


def is_held_out(*parts: object) -> bool:
    """Whether a combination, such as ("cat", "dog"), is kept out of training: one in ten is."""
    return zlib.crc32("|".join(map(str, parts)).encode()) % 10 == 0


def render(scene: Scene, side: int) -> Image.Image:
    """Draws the scene as an RGB picture of `side` x `side` pixels, later things over earlier ones."""
    canvas = Image.fromarray(draw_background(scene.background, side))
    for thing in scene.things:
        picture = sprite(
            thing.kind.concept.emoji, scene.style, thing.kind.hue, round(thing.size * side), side=side
        )
        corner = (
            round(thing.x * side - picture.width / 2),
            round(thing.y * side - picture.height / 2),
        )
        canvas.paste(picture, corner, picture)
    return canvas


@lru_cache(maxsize=65536)
def is_visible(emoji: str, style: str, hue: str | None, color: str) -> bool:
    """Whether enough of a thing stands out from a background colour."""
    pixels = np.asarray(artwork(emoji, style, hue, 32).convert("RGBA"), dtype=np.float32)
    distance = np.linalg.norm(pixels[..., :3] - np.array(COLORS[color], np.float32), axis=2)
    opacity = pixels[..., 3]
    return bool((opacity * (distance > _VISIBLE_LEVELS)).sum() >= _VISIBLE * opacity.sum())


def called(kind: Kind) -> str:
    """The kind's hue and name."""
    return f"{kind.hue} {kind.concept.name}" if kind.hue else kind.concept.name


def _draw(task: str, tier: str, rng: random.Random) -> Scene:
    style = rng.choice(STYLES)
    kinds, relation = _content(task, tier, style, rng)
    plain = 0.0 if task == "pattern" else 0.7
    while True:
        background = sample_background(rng, plain=plain)
        colors = [color for color in (background.first, background.second) if color]
        seen = {kind.concept.emoji: kind.hue for kind in kinds}
        if all(is_visible(emoji, style, hue, color) for emoji, hue in seen.items() for color in colors):
            return Scene(task, style, arrange(kinds, relation, rng), background, relation)
        if rng.random() < 0.05:  # something that vanishes on nearly everything
            kinds, relation = _content(task, tier, style, rng)


def _content(task: str, tier: str, style: str, rng: random.Random) -> tuple[list[Kind], str | None]:
    """The kind of each thing, in the order of the relation's words, and the relation."""
    every = concepts(tier)
    if task in ("color", "attribution"):
        drawn = _hued(1 if task == "color" else 2, every, style, rng)
        return drawn, None
    if task == "counting":
        return _counted(every, style, rng), None
    number = {"two": 2, "position": rng.choice((1, 2, 2, 2, 3)), "size": rng.choice((1, 2))}.get(task, 1)
    kinds = [_kind(concept, style, rng) for concept in rng.sample(every, number)]
    if task == "size":
        sizes = [rng.choice(("small", "big"))] if number == 1 else rng.sample(("small", "big"), 2)
        kinds = [replace(kind, size=size) for kind, size in zip(kinds, sizes, strict=True)]
    if task != "position":
        return kinds, None
    return kinds, {1: rng.choice(CORNERS), 2: rng.choice(RELATIONS), 3: "between"}[number]


def _kind(concept: Concept, style: str, rng: random.Random) -> Kind:
    hue = rng.choice(list(HUES)) if rng.random() < _HUE_RATE and takes_hue(concept.emoji, style) else None
    return Kind(concept, hue)


def _hued(number: int, every: tuple[Concept, ...], style: str, rng: random.Random) -> list[Kind]:
    """So many different concepts in different hues."""
    hues = rng.sample(list(HUES), number)
    drawn: list[Concept] = []
    while len(drawn) < number:
        concept = rng.choice(every)
        if concept not in drawn and takes_hue(concept.emoji, style):
            drawn.append(concept)
    return [Kind(concept, hue) for concept, hue in zip(drawn, hues, strict=True)]


def _counted(every: tuple[Concept, ...], style: str, rng: random.Random) -> list[Kind]:
    """Two to five of one kind; or of two kinds, the first of them more than once."""
    countable = [concept for concept in every if any(noun.can_count for noun in concept.nouns)]
    count = rng.randint(2, MAX_COUNT)
    first = _kind(rng.choice(countable), style, rng)
    if count == 2 or rng.random() < 0.7:
        return [first] * count
    other = _kind(rng.choice([concept for concept in countable if concept != first.concept]), style, rng)
    more = rng.randint(2, count - 1)
    return [first] * more + [other] * (count - more)


def arrange(kinds: list[Kind], relation: str | None, rng: random.Random) -> tuple[Thing, ...]:
    """Draws free places and sizes for kinds, in order; sizes shrink a little each time that no place is found."""
    shrink = 1.0
    while True:
        sizes = [_size(kind, len(kinds), relation, rng) * shrink for kind in kinds]
        for _ in range(20):
            placed = _try(kinds, sizes, relation, rng)
            if placed is not None:
                return placed
        shrink = max(0.85, 0.97 * shrink)


def _size(kind: Kind, number: int, relation: str | None, rng: random.Random) -> float:
    if relation in CORNERS:
        return rng.uniform(*_CORNER_SIZES)
    if kind.size is not None:
        small, big = (_SMALL, _BIG) if number == 1 else (_SMALL_OF_TWO, _BIG_OF_TWO)
        return rng.uniform(*(small if kind.size == "small" else big))
    return rng.uniform(*_SIZES[number])


def _try(
    kinds: list[Kind], sizes: list[float], relation: str | None, rng: random.Random
) -> tuple[Thing, ...] | None:
    things: list[Thing] = []
    for kind, size in zip(kinds, sizes, strict=True):
        for _ in range(12):
            thing = Thing(kind, _coordinate(size, rng), _coordinate(size, rng), size)
            if all(_are_apart(thing, other) for other in things):
                things.append(thing)
                break
        else:
            return None
    return tuple(things) if holds(relation, things) else _sorted(relation, things)


def _coordinate(size: float, rng: random.Random) -> float:
    reach = size / 2 + _MARGIN
    return rng.uniform(reach, 1 - reach) if reach < 0.5 else 0.5


def _are_apart(one: Thing, other: Thing) -> bool:
    return float(np.hypot(one.x - other.x, one.y - other.y)) >= _APART * (one.size + other.size)


def holds(relation: str | None, things: list[Thing], *, offset: float = _OFFSET) -> bool:
    """Whether things stand as a relation says, the centres at least `offset` apart along its axis.

    Along its axis they are also further apart than across, so that nobody would say it otherwise. In a corner is who
    is in that third of the picture, about.
    """
    if relation is None:
        return True
    if relation in CORNERS:
        x, y = things[0].x, things[0].y
        down, across = relation.split()
        return (y < 0.37 if down == "top" else y > 0.63) and (x < 0.37 if across == "left" else x > 0.63)
    if relation == "between":
        middle, one, other = things
        ordered = sorted((one, other), key=lambda thing: (thing.x, thing.y))
        in_row = all(_is_left(*two, offset) for two in ((ordered[0], middle), (middle, ordered[1])))
        high, low = sorted((one, other), key=lambda thing: thing.y)
        return in_row or all(_is_above(*two, offset) for two in ((high, middle), (middle, low)))
    first, second = things[:2]
    if relation in ("right of", "below"):
        first, second = second, first
    return (_is_left if relation in ("left of", "right of") else _is_above)(first, second, offset)


def _is_left(one: Thing, other: Thing, offset: float) -> bool:
    return other.x - one.x >= max(offset, 1.2 * abs(other.y - one.y))


def _is_above(one: Thing, other: Thing, offset: float) -> bool:
    return other.y - one.y >= max(offset, 1.2 * abs(other.x - one.x))


def _sorted(relation: str | None, things: list[Thing]) -> tuple[Thing, ...] | None:
    """The same places with two things exchanged, if the relation holds then."""
    if len(things) < 2:
        return None
    first, second, *rest = things
    swapped = [replace(first, x=second.x, y=second.y), replace(second, x=first.x, y=first.y), *rest]
    inside = all(thing.size / 2 <= min(thing.x, thing.y, 1 - thing.x, 1 - thing.y) for thing in swapped)
    apart = all(_are_apart(one, other) for one, other in pairs_of(swapped, 2))
    return tuple(swapped) if inside and apart and holds(relation, swapped) else None
