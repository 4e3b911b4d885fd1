"""Measures the judge's error rates on pictures whose content is known: `python -m recipes.emoji3d.check_judge`.

`accepted` measures are on right pictures: real ones, ones blurred, noisy and displaced as a small model's, and ones that
an autoencoder has encoded and decoded. `rejected` measures are on wrong ones: other captions, and near misses that
differ from the caption's scene in one respect.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from recipes.emoji3d.artwork import HUES, STYLES, takes_hue
from recipes.emoji3d.backgrounds import Background, sample_background
from recipes.emoji3d.concepts import Concept, concepts, tier_of
from recipes.emoji3d.judge import are_same, judge
from recipes.emoji3d.look_alikes import canonical
from recipes.emoji3d.samples import Prompt, evaluation_prompts
from recipes.emoji3d.scenes import Kind, Scene, Thing, arrange, holds, is_visible, render

SIDE = 128


def picture(scene: Scene) -> np.ndarray:
    """The scene's real picture, uint8 (128,128,3)."""
    return np.asarray(render(scene, SIDE))


def degrade(image: np.ndarray, seed: int, psnr: float = 28.0) -> np.ndarray:
    """Degrades a picture to the given PSNR as a small autoencoder would: half of the squared error is blur, half soft noise."""
    error = 255.0**2 / 10 ** (psnr / 10)
    blur = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1.5)), np.float32) - image
    blur *= min(1.0, (0.5 * error / max(float(np.square(blur).mean()), 1e-6)) ** 0.5)
    coarse = np.random.default_rng(seed).normal(size=(SIDE // 2, SIDE // 2, 3)).astype(np.float32)
    noise = coarse.repeat(2, axis=0).repeat(2, axis=1)  # an autoencoder errs in patches, not in single pixels
    noise *= ((error - float(np.square(blur).mean())) / float(np.square(noise).mean())) ** 0.5
    degraded: np.ndarray = np.clip(np.round(image + blur + noise), 0, 255).astype(np.uint8)
    return degraded


def displace(scene: Scene, rng: random.Random) -> Scene:
    """Perturbs a scene: every thing is moved by up to 2% of the side and resized by up to 5%."""
    moved = []
    for thing in scene.things:
        size = thing.size * rng.uniform(0.95, 1.02)
        x, y = (min(max(at + rng.uniform(-0.02, 0.02), size / 2), 1 - size / 2) for at in (thing.x, thing.y))
        moved.append(replace(thing, x=x, y=y, size=size))
    return replace(scene, things=tuple(moved))


def is_true(prompt: Prompt, shown: Scene) -> bool:
    """Whether a prompt's caption holds for another scene's picture."""
    scene, says = prompt.scene, prompt.says

    def asked(each: Scene) -> Counter[Kind]:
        return Counter(
            thing.kind if says.names_sizes else replace(thing.kind, size=None) for thing in each.things
        )

    if asked(scene) != asked(shown) or (says.names_style and scene.style != shown.style):
        return False
    if says.names_background and not are_same(scene.background, shown.background):
        return False
    if scene.relation is None or not says.names_relation:
        return True
    found = {thing.kind: thing for thing in shown.things}
    return holds(scene.relation, [found[thing.kind] for thing in scene.things])


def near_misses(scene: Scene, rng: random.Random) -> dict[str, Scene]:
    """Scenes that differ from a scene in one respect, most of them so that its caption is false for them."""
    things = scene.things
    kinds = [thing.kind for thing in things]
    which = rng.randrange(len(kinds))
    one = kinds[which]
    misses: dict[str, Scene] = {}
    if len(kinds) < 5:
        misses["one more"] = _anew(scene, [*kinds, replace(rng.choice(kinds), size=None)], rng)
        misses["a stranger"] = _anew(scene, [*kinds, Kind(_stranger(scene, rng))], rng)
    if len(kinds) > 1:
        misses["one less"] = replace(scene, things=things[:which] + things[which + 1 :])
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        misses["exchanged"] = replace(scene, things=_exchanged(things))
    misses["look-alike"] = _with(scene, which, replace(one, concept=look_alike(one.concept, scene.style)))
    if takes_hue(one.concept.emoji, scene.style):
        hues = [hue for hue in HUES if hue != one.hue and _is_seen(replace(one, hue=hue), scene)]
        if hues:
            misses["hue"] = _with(scene, which, replace(one, hue=rng.choice(hues)))
    misses["style"] = replace(scene, style=STYLES[1 - STYLES.index(scene.style)])
    if one.size and len(kinds) == 1:
        other, size = ("big", 0.85) if one.size == "small" else ("small", 0.36)
        misses["size"] = replace(scene, things=(Thing(replace(one, size=other), 0.5, 0.5, size),))
    misses["background"] = replace(scene, background=_other_background(scene, rng))
    return misses


@cache
def look_alike(concept: Concept, style: str) -> Concept:
    """The other concept of the tier whose artwork in a style is nearest."""
    own = _flat(concept, style)
    others = [each for each in concepts(tier_of(concept)) if each != concept]
    return min(others, key=lambda each: float((_flat(each, style) - own).square().sum()))


@cache
def _flat(concept: Concept, style: str) -> Tensor:
    return canonical(Kind(concept), style)


def _with(scene: Scene, which: int, kind: Kind) -> Scene:
    changed = replace(scene.things[which], kind=kind)
    return replace(scene, things=(*scene.things[:which], changed, *scene.things[which + 1 :]))


def _anew(scene: Scene, kinds: list[Kind], rng: random.Random) -> Scene:
    return replace(scene, things=arrange([replace(kind, size=None) for kind in kinds], None, rng))


def _stranger(scene: Scene, rng: random.Random) -> Concept:
    drawn = {thing.kind.concept for thing in scene.things}
    every = [each for each in concepts(tier_of(scene.things[0].kind.concept)) if each not in drawn]
    return next(each for each in rng.sample(every, len(every)) if _is_seen(Kind(each), scene))


def _exchanged(things: tuple[Thing, ...]) -> tuple[Thing, ...]:
    first, second = things
    return replace(first, kind=second.kind), replace(second, kind=first.kind)


def _is_seen(kind: Kind, scene: Scene) -> bool:
    colors = (scene.background.first, scene.background.second)
    return all(is_visible(kind.concept.emoji, scene.style, kind.hue, color) for color in colors if color)


def _other_background(scene: Scene, rng: random.Random) -> Background:
    for _ in range(500):
        found = sample_background(rng, plain=0.5)
        if not are_same(found, scene.background) and all(
            _is_seen(thing.kind, replace(scene, background=found)) for thing in scene.things
        ):
            return found
    return scene.background


def measure(
    prompts: list[Prompt], *, device: str = "cpu", encode: Callable[[np.ndarray], np.ndarray] | None = None
) -> tuple[dict[str, list[bool]], dict[str, list[bool]]]:
    """The judge's answers on right and on wrong pictures, by kind of picture: True is "correct".

    Args:
        prompts: whose pictures are made.
        device: for the judge.
        encode: makes of a picture what an autoencoder makes of it; None measures without one.
    """
    right: dict[str, list[bool]] = {}
    wrong: dict[str, list[bool]] = {}
    judged = partial(judge, device=device)
    for number, prompt in enumerate(prompts):
        rng = random.Random(f"check-{number}")
        scene, real = prompt.scene, picture(prompt.scene)
        shown = {"real": real, "28 dB": degrade(real, number)}
        moved = displace(scene, rng)
        if is_true(prompt, moved):
            shown["displaced, 28 dB"] = degrade(picture(moved), number)
        if encode is not None:
            shown["autoencoder"] = encode(real)
        for name, image in shown.items():
            right.setdefault(name, []).append(judged(image, prompt).correct)
        other = prompts[(number + 7 * 9) % len(prompts)]  # of the same task
        misses = {"another caption": other.scene, **near_misses(scene, rng)}
        for name, miss in misses.items():
            if not is_true(prompt, miss):
                wrong.setdefault(name, []).append(judged(picture(miss), prompt).correct)
    return right, wrong


def reconstruction(folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The function that encodes and decodes a picture with the autoencoder in a folder."""
    from sana_sprint import backends
    from sana_sprint.images import to_pil  # only with a folder: the judge itself needs no model
    from sana_sprint.models.autoencoder import AutoencoderDC
    from sana_sprint.weights import load_model

    model = backends.apply(load_model(AutoencoderDC, folder, dtype=torch.float32))

    def encode(image: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            return np.asarray(to_pil(model.decode(model.encode(pixels)).clamp(-1, 1))[0])

    return encode


def _lines(title: str, measured: dict[str, list[bool]]) -> Iterable[str]:
    yield title
    for name, answers in measured.items():
        yield f"  {name:20} {sum(answers) / len(answers):6.1%} of {len(answers)}"
    every = [answer for answers in measured.values() for answer in answers]
    yield f"  {'all':20} {sum(every) / len(every):6.1%} of {len(every)}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=270, help="prompts (default: 270)")
    parser.add_argument("--tier", default="everyday", help="whose concepts: everyday, further or all")
    parser.add_argument(
        "--autoencoder", type=Path, help="folder of an autoencoder, to judge what it restores"
    )
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    encode = reconstruction(arguments.autoencoder) if arguments.autoencoder else None
    prompts = evaluation_prompts(arguments.count, tier=arguments.tier)
    right, wrong = measure(prompts, device=arguments.device, encode=encode)
    print(
        "\n".join([*_lines("accepted, of right pictures", right), *_lines("accepted, of wrong ones", wrong)])
    )


if __name__ == "__main__":
    main()
