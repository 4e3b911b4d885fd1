"""Measures the judge's error rates on pictures whose content is known: `python -m recipes.emoji.check_judge`.

`accepted` measures are on right pictures: real ones, and ones made as blurred, noisy and displaced as a small model's.
`rejected` measures are on wrong ones: other captions, near misses that differ in one respect, and damaged pictures.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
from PIL import Image, ImageFilter

from recipes.emoji import vocabulary as words
from recipes.emoji.judge import decide, evaluation_scenes, judge
from recipes.emoji.matcher import find
from recipes.emoji.scenes import SIZE, TASKS, Placed, Scene, render, sample_scene

# Where the objects of a near miss with one object more stand.
_SPOTS = {
    2: ((32, 64), (96, 64)),
    3: ((64, 32), (32, 96), (96, 96)),
    4: ((32, 32), (96, 32), (32, 96), (96, 96)),
    5: ((22, 32), (64, 32), (106, 32), (42, 96), (86, 96)),
}


def picture(scene: Scene) -> np.ndarray:
    """The scene's real picture, uint8 (128,128,3)."""
    return np.asarray(render(scene))


def degrade(image: np.ndarray, seed: int, psnr: float = 28.0) -> np.ndarray:
    """Degrades a picture to the given PSNR as a small autoencoder would: half of the squared error is blur, half soft noise."""
    error = 255.0**2 / 10 ** (psnr / 10)
    blur = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1.5)), np.float32) - image
    blur *= min(1.0, (0.5 * error / max(float(np.square(blur).mean()), 1e-6)) ** 0.5)
    coarse = np.random.default_rng(seed).normal(size=(SIZE // 2, SIZE // 2, 3)).astype(np.float32)
    noise = coarse.repeat(2, axis=0).repeat(2, axis=1)  # an autoencoder errs in patches, not in single pixels
    noise *= ((error - float(np.square(blur).mean())) / float(np.square(noise).mean())) ** 0.5
    degraded: np.ndarray = np.clip(np.round(image + blur + noise), 0, 255).astype(np.uint8)
    return degraded


def displace(scene: Scene, rng: random.Random) -> Scene:
    """Perturbs a scene: every object is moved by up to 4 pixels and resized by up to 8%."""
    return replace(
        scene,
        objects=tuple(
            Placed(
                p.kind, p.x + rng.uniform(-4, 4), p.y + rng.uniform(-4, 4), p.size * rng.uniform(0.92, 1.04)
            )
            for p in scene.objects
        ),
    )


def is_true(caption: Scene, shown: Scene) -> bool:
    """Whether one scene's caption holds for another scene's picture."""
    if Counter(p.kind for p in caption.objects) != Counter(p.kind for p in shown.objects):
        return False
    if caption.names_background and caption.background != shown.background:
        return False
    if caption.relation is None:
        return True
    axis = "x" if caption.relation in ("left of", "right of") else "y"
    order = {p.kind: getattr(p, axis) for p in caption.objects}
    low, high = (
        next(p for p in shown.objects if p.kind == kind) for kind in sorted(order, key=order.__getitem__)
    )
    return bool(getattr(high, axis) - getattr(low, axis) >= SIZE / 4)


def near_misses(scene: Scene, rng: random.Random) -> dict[str, Scene]:
    """Scenes that differ from a scene in one respect, so that its caption is false for them."""
    objects = scene.objects
    kinds = [p.kind for p in objects]
    misses = {"one more": replace(scene, objects=_spread([*kinds, rng.choice(kinds)], rng))}
    if len(objects) < 4:
        stranger = rng.choice(_seen_on(scene.background, set(kinds)))
        misses["a stranger"] = replace(scene, objects=_spread([*kinds, stranger], rng))
    if len(objects) > 1:
        misses["one less"] = replace(scene, objects=_without(objects, rng))
    which = rng.randrange(len(objects))
    alike = replace(objects[which], kind=look_alike(objects[which].kind, scene.background))
    misses["look-alike"] = replace(scene, objects=(*objects[:which], alike, *objects[which + 1 :]))
    if scene.relation:
        first, second = objects
        swapped = (replace(first, kind=second.kind), replace(second, kind=first.kind))
        misses["swapped"] = replace(scene, objects=swapped)
        turned = tuple(replace(p, x=p.y, y=p.x) for p in objects)
        misses["other axis"] = replace(scene, objects=turned)
    if scene.names_background:
        free = [
            b
            for b in words.BACKGROUNDS
            if b != scene.background and not any(words.clashes(k, b) for k in kinds)
        ]
        misses["background"] = replace(scene, background=rng.choice(free))
    # A look-alike may stand where the caption has that kind too: then nothing is missed.
    return {name: miss for name, miss in misses.items() if not is_true(scene, miss)}


def _without(objects: tuple[Placed, ...], rng: random.Random) -> tuple[Placed, ...]:
    gone = rng.randrange(len(objects))
    return (*objects[:gone], *objects[gone + 1 :])


def _spread(kinds: Sequence[str], rng: random.Random) -> tuple[Placed, ...]:
    shuffled = rng.sample(list(kinds), len(kinds))
    size = 52 if len(kinds) < 5 else 42
    return tuple(Placed(kind, x, y, size) for kind, (x, y) in zip(shuffled, _SPOTS[len(kinds)], strict=True))


@cache
def look_alike(kind: str, background: str) -> str:
    """The other kind whose artwork differs least from a kind's, on a background where it can be seen."""
    return min(_seen_on(background, {kind}), key=lambda other: _difference(kind, other, background))


def strangers(kind: str, background: str) -> list[str]:
    """The half of the other kinds that differs most from a kind, on a background where they can be seen."""
    others = sorted(_seen_on(background, {kind}), key=lambda other: _difference(kind, other, background))
    return others[len(others) // 2 :]


def _seen_on(background: str, without: set[str]) -> list[str]:
    return [kind for kind in words.KINDS if kind not in without and not words.clashes(kind, background)]


def _difference(kind: str, other: str, background: str) -> float:
    return float(np.square(_portrait(kind, background) - _portrait(other, background)).sum())


@cache
def _portrait(kind: str, background: str) -> np.ndarray:
    scene = Scene("single", (Placed(kind, 64, 64, 86),), background, False, None, "")
    return np.asarray(render(scene).resize((32, 32)), np.float32)


def damaged(scene: Scene, rng: random.Random) -> dict[str, np.ndarray]:
    """Makes wrong pictures: half an object, two objects in one place, noise, an empty background."""
    whole = picture(scene)
    ground = np.array(words.BACKGROUNDS[scene.background], np.uint8)
    which = rng.randrange(len(scene.objects))
    one = scene.objects[which]
    other = replace(one, kind=rng.choice(strangers(one.kind, scene.background)))
    mixed = picture(replace(scene, objects=(*scene.objects[:which], other, *scene.objects[which + 1 :])))
    half = _half(one, rng)
    return {
        "half erased": np.where(half, ground, whole).astype(np.uint8),
        "two halves": np.where(half, mixed, whole),
        "two blended": np.round((whole.astype(np.float32) + mixed) / 2).astype(np.uint8),
        "noise": np.random.default_rng(rng.randrange(2**32)).integers(0, 256, whole.shape, np.uint8),
        "blank": np.broadcast_to(ground, whole.shape).copy(),
    }


def _half(thing: Placed, rng: random.Random) -> np.ndarray:
    """Masks a random half (left, right, upper or lower) of an object. Bool (128,128,1)."""
    y, x = np.mgrid[:SIZE, :SIZE]
    side = rng.choice((x - thing.x, thing.x - x, y - thing.y, thing.y - y))
    near = np.maximum(abs(x - thing.x), abs(y - thing.y)) <= thing.size / 2 + 1
    half: np.ndarray = (side > 0) & near
    return half[..., None]


Tally = dict[tuple[str, str], list[bool]]  # (measure, task) -> whether each picture was accepted


def measure(scenes: Sequence[Scene]) -> Tally:
    """Judges every scene's pictures, right and wrong ones."""
    tally: Tally = {}

    def note(name: str, scene: Scene, correct: bool) -> None:
        tally.setdefault((name, scene.task), []).append(correct)

    findings = [find(picture(scene)) for scene in scenes]
    for i, scene in enumerate(scenes):
        rng = random.Random(i)
        note("real", scene, decide(findings[i], scene).correct)
        note("28 dB", scene, judge(degrade(picture(scene), i), scene).correct)
        note("28 dB, displaced", scene, judge(degrade(picture(displace(scene, rng)), i), scene).correct)
        for shown, finding in zip(scenes, findings, strict=True):
            if not is_true(scene, shown):
                note("other caption", scene, decide(finding, scene).correct)
        for name, miss in near_misses(scene, rng).items():
            note(name, scene, judge(picture(miss), scene).correct)
        for name, image in damaged(scene, rng).items():
            note(name, scene, judge(image, scene).correct)
    return tally


def both_splits(count: int) -> list[Scene]:
    """Scenes of every task in turn, half of them the evaluation's, half from the training split."""
    training = [sample_scene(i // len(TASKS), task=TASKS[i % len(TASKS)]) for i in range(count - count // 2)]
    return [*evaluation_scenes(count // 2), *training]


def main() -> None:
    """Prints the accepted part of each kind of picture, by task. Argument: the number of scenes (360)."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 360
    tally = measure(both_splits(count))
    print(
        f"accepted pictures (%), {count} scenes".ljust(28),
        *(f"{task:>12}" for task in (*TASKS, "overall", "pictures")),
    )
    for name in dict.fromkeys(name for name, _ in tally):
        rows = [tally.get((name, task), []) for task in TASKS]
        pooled = [correct for row in rows for correct in row]
        cells = [f"{100 * sum(row) / len(row):12.2f}" if row else " " * 12 for row in (*rows, pooled)]
        print(name.ljust(28), *cells, f"{len(pooled):12}")


if __name__ == "__main__":
    main()
