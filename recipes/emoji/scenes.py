"""Captioned emoji scenes: the content of a picture, its captions and its rendering.

Six tasks, GenEval's in small: one object, two objects, counting, colours, position and colour attribution.
Everything is a pure function of an integer seed, so data set position i is the same scene on every machine.
A fixed tenth of all combinations (`is_held_out`) never appears in the training split: those judge the model.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from recipes.emoji import vocabulary as words

SIZE = 128  # pixels, both sides
FONT_PATH = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
TASKS = ("single", "two", "counting", "color", "position", "attribution")
NUM_CAPTIONS = 6  # of each training picture
RELATIONS = ("left of", "right of", "above", "below")
# How a caption may say each relation.
_RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "on top of"),
    "below": ("below", "under"),
}
# Where the first and the second object of a relation are.
_PLACE_WORDS = {
    "left of": ("on the left", "on the right"),
    "right of": ("on the right", "on the left"),
    "above": ("at the top", "at the bottom"),
    "below": ("at the bottom", "at the top"),
}
_AXIS = {"left of": "x", "right of": "x", "above": "y", "below": "y"}
_LEFT_RIGHT = ((32, 64), (96, 64))
_ABOVE_BELOW = ((64, 32), (64, 96))
_LAYOUTS = {
    1: ((64, 64),),
    2: _LEFT_RIGHT,
    3: ((64, 32), (32, 96), (96, 96)),
    4: ((32, 32), (96, 32), (32, 96), (96, 96)),
}


@dataclass(frozen=True, slots=True)
class Placed:
    """One object: its kind, its centre and side length in pixels."""

    kind: str
    x: float
    y: float
    size: float


@dataclass(frozen=True, slots=True)
class Scene:
    """The content of a picture. `background` is always drawn; the caption mentions it if `names_background`."""

    task: str
    objects: tuple[Placed, ...]
    background: str
    names_background: bool
    relation: str | None
    caption: str


def is_held_out(*parts: object) -> bool:
    """Returns True for the tenth of all combinations, such as ("cat", "left of", "dog"), that is kept out of training."""
    return zlib.crc32("|".join(map(str, parts)).encode()) % 10 == 0


def sample_scene(seed: int, *, held_out: bool = False, task: str | None = None) -> Scene:
    """Draws the scene with number `seed`.

    Args:
        seed: any integer; equal seeds give equal scenes.
        held_out: draw only combinations that training never sees (True) or only the others (False).
        task: one of `TASKS`; None draws one.
    """
    rng = random.Random(f"scene-{seed}-{held_out}-{task}")
    # Single objects have the most detail, and what stands where is hardest to learn: they come up more often.
    chosen = task or rng.choices(TASKS, weights=(22, 16, 14, 4, 36, 8))[0]
    while True:
        kinds, count, relation = _draw_content(chosen, rng)
        background = rng.choice([b for b in words.BACKGROUNDS if not any(words.clashes(k, b) for k in kinds)])
        names_background = rng.random() < 0.6
        # A single thing's combination is with its background, which its caption then names.
        if chosen in ("single", "color"):
            names_background = names_background or held_out
            key: tuple[object, ...] = (*kinds, background)
        elif chosen == "counting":
            key = (*kinds, count)
        else:
            # Without the order: "a cat left of a dog" must not be known from "a dog right of a cat".
            key = (*sorted(kinds), _AXIS[relation]) if relation else tuple(sorted(kinds))
        if is_held_out(*key) == held_out:
            break
    objects = _place(kinds, count, relation, rng)
    caption = caption_of(kinds, count, relation, background if names_background else None, rng)
    return Scene(chosen, objects, background, names_background, relation, caption)


def describe(scene: Scene, rng: random.Random) -> str:
    """Writes another true caption of the scene: other words, the other order, with or without its background."""
    kinds = list(
        dict.fromkeys(placed.kind for placed in scene.objects)
    )  # from left to right, or from the top
    relation = scene.relation
    if len(kinds) == 2 and rng.random() < 0.5:
        kinds.reverse()
        relation = relation and ("right of" if _AXIS[relation] == "x" else "below")
    elif relation:
        relation = "left of" if _AXIS[relation] == "x" else "above"
    background = scene.background if rng.random() < 0.6 else None
    if relation and rng.random() < 0.15:
        return _place_by_place(kinds, relation, background)
    return caption_of(kinds, len(scene.objects), relation, background, rng)


def render(scene: Scene) -> Image.Image:
    """Draws the scene as an RGB picture of `SIZE` x `SIZE` pixels."""
    canvas = Image.new("RGB", (SIZE, SIZE), words.BACKGROUNDS[scene.background])
    for placed in scene.objects:
        sprite = artwork(placed.kind, round(placed.size))
        corner = (round(placed.x - sprite.width / 2), round(placed.y - sprite.height / 2))
        canvas.paste(sprite, corner, sprite)
    return canvas


@lru_cache(maxsize=8192)
def artwork(kind: str, size: int) -> Image.Image:
    """The kind's artwork as RGBA, its longer side `size` pixels."""
    original = _glyph(kind)
    scale = size / max(original.size)
    shape = (max(1, round(original.width * scale)), max(1, round(original.height * scale)))
    return original.resize(shape, Image.Resampling.LANCZOS)


def crowded(seed: int) -> Image.Image:
    """A picture for the autoencoder alone: several objects at random places and sizes, overlaps allowed.

    Object pixels are the hard ones, and ordinary scenes have few of them.
    """
    rng = random.Random(f"crowd-{seed}")
    canvas = Image.new("RGB", (SIZE, SIZE), rng.choice(list(words.BACKGROUNDS.values())))
    for x, y in _LAYOUTS[4]:
        sprite = artwork(rng.choice(list(words.KINDS)), rng.randint(46, 90))
        corner = (
            round(x + rng.uniform(-12, 12) - sprite.width / 2),
            round(y + rng.uniform(-12, 12) - sprite.height / 2),
        )
        canvas.paste(sprite, corner, sprite)
    return canvas


@lru_cache(maxsize=1)
def font() -> ImageFont.FreeTypeFont:
    if not FONT_PATH.is_file():
        raise FileNotFoundError(f"{FONT_PATH} is missing; hint: apt-get install fonts-noto-color-emoji")
    return ImageFont.truetype(str(FONT_PATH), 109)  # the only size of its bitmaps


@cache
def _glyph(kind: str) -> Image.Image:
    canvas = Image.new("RGBA", (180, 180), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((20, 20), words.KINDS[kind], font=font(), embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    if box is None:
        raise ValueError(f"the font at {FONT_PATH} has no artwork for {kind!r}")
    return canvas.crop(box)


def _draw_content(task: str, rng: random.Random) -> tuple[list[str], int, str | None]:
    """(kinds, count, relation) for a task; count is the number of objects drawn."""
    every, shapes = list(words.KINDS), list(words.SHAPES)
    if task == "single":
        return [rng.choice(list(words.OBJECTS))], 1, None
    if task == "color":
        return [rng.choice(shapes)], 1, None
    if task == "counting":
        return [rng.choice(every)], rng.choice((2, 3, 4)), None
    if task == "attribution":
        return _differently_colored(rng), 2, None
    return rng.sample(every, 2), 2, rng.choice(RELATIONS) if task == "position" else None


def _differently_colored(rng: random.Random) -> list[str]:
    first, second = rng.sample(words.SHAPE_COLORS, 2)
    return [f"{color} {rng.choice(('heart', 'circle', 'square'))}" for color in (first, second)]


def _place(kinds: list[str], count: int, relation: str | None, rng: random.Random) -> tuple[Placed, ...]:
    spots = _ABOVE_BELOW if relation in ("above", "below") else _LAYOUTS[count]
    names = kinds * count if len(kinds) == 1 else list(kinds)
    if relation in ("right of", "below") or (relation is None and rng.random() < 0.5):
        names.reverse()
    size, jitter = (rng.uniform(80, 92), 5) if count == 1 else (rng.uniform(50, 57), 3)
    return tuple(
        Placed(name, x + rng.uniform(-jitter, jitter), y + rng.uniform(-jitter, jitter), size)
        for name, (x, y) in zip(names, spots, strict=True)
    )


def caption_of(
    kinds: list[str], count: int, relation: str | None, background: str | None, rng: random.Random
) -> str:
    """A caption of so many objects of these kinds; relation and background are named unless None."""
    nouns = [rng.choice((kind, kind, *words.SYNONYMS.get(kind, ()))) for kind in kinds]
    if len(nouns) == 1:
        noun = nouns[0]
        subject = words.with_article(noun) if count == 1 else f"{words.NUMBERS[count]} {words.plural(noun)}"
        if count == 1 and rng.random() < 0.15:
            subject = "one" + subject[subject.index(" ") :]
    else:
        first, second = map(words.with_article, nouns)
        subject = f"{first} {rng.choice(_RELATION_WORDS[relation]) if relation else 'and'} {second}"
    subject = rng.choice(("", "", "a photo of ", "a picture of ")) + subject
    if background is None:
        return subject
    form = rng.random()
    if form < 0.8:
        return f"{subject} on a {background} background".replace("a orange b", "an orange b")
    return f"{background} background, {subject}"


def _place_by_place(kinds: list[str], relation: str, background: str | None) -> str:
    first, second = map(words.with_article, kinds)
    here, there = _PLACE_WORDS[relation]
    ending = "" if background is None else f" on {words.with_article(background)} background"
    return f"{here} {first}, {there} {second}{ending}"


def training_picture(index: int) -> np.ndarray:
    """Autoencoder sample `index`: every other one crowded. uint8 (SIZE, SIZE, 3)."""
    return np.asarray(crowded(index) if index % 2 else render(sample_scene(index)))


def training_scene(index: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Text-to-picture sample `index`: (uint8 (SIZE, SIZE, 3), captions), from the training split."""
    return _captioned(sample_scene(index), index)


def training_pair(index: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """The same of the task "position" alone."""
    return _captioned(sample_scene(index, task="position"), index)


def _captioned(scene: Scene, index: int) -> tuple[np.ndarray, tuple[str, ...]]:
    rng = random.Random(f"captions-{index}")
    others = [describe(scene, rng) for _ in range(NUM_CAPTIONS - 1)]
    return np.asarray(render(scene)), (scene.caption, *others)
