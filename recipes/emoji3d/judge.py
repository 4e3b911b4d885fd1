"""The compositional judge: whether a picture is what its caption says, GenEval's way.

A picture is correct if it has exactly the caption's things, whole and in the caption's hues, and nothing else; and,
where the caption names them, its sizes, its relation, its style and its background. How far the judge itself can be
trusted: `python -m recipes.emoji3d.check_judge`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from recipes.emoji3d.artwork import STYLES
from recipes.emoji3d.background_finder import SIDE, FoundBackground, find_background
from recipes.emoji3d.backgrounds import Background
from recipes.emoji3d.look_alikes import better_kind
from recipes.emoji3d.matcher import Layout, Place, locate
from recipes.emoji3d.samples import Prompt, evaluation_prompts
from recipes.emoji3d.scenes import TASKS, Scene, Thing, called, holds

# Each threshold lies between real pictures degraded to 28 dB and the strongest wrong ones, see `check_judge`.
MIN_FIT = 0.6  # of a thing that is whole
MAX_LEFTOVER = 26.0  # levels, where there is nothing
MIN_OFFSET = 0.15  # of the side, between the centres of things in a relation; scenes have 0.22
MAX_SMALL, MIN_BIG = 0.5, 0.64  # of the side, for one thing: scenes have at most 0.42 and at least 0.72
MIN_RATIO = 1.25  # of a big thing to a small one beside it; scenes have at least 1.5


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a picture is what its caption says, what is wrong ("" if nothing), and what was found.

    The style is the one in which the caption's things fit best.
    """

    correct: bool
    reason: str
    places: tuple[Place, ...]
    style: str
    background: Background


def judge(image: Image.Image | np.ndarray, prompt: Prompt, *, device: str | torch.device = "cpu") -> Verdict:
    """Judges one square picture (a PIL image, or RGB uint8 (H,H,3)) by a prompt.

    Raises:
        ValueError: the picture is not square, or of another type.
    """
    picture = _tensor(image).to(device)
    found = find_background(picture)
    kinds = [thing.kind for thing in prompt.scene.things]
    # The background is looked for among all; things are looked for in the style that makes the smaller error.
    layouts = [locate(picture, found.pixels, kinds, style) for style in STYLES]
    layout = min(layouts, key=lambda each: each.error)
    reason = (
        _wrong_background(found, prompt)
        or _wrong_things(picture, layout, prompt.scene)
        or _wrong_style(layout, prompt)
        or _wrong_sizes(layout, prompt)
        or _wrong_relation(layout, prompt)
    )
    return Verdict(not reason, reason, layout.places, layout.style, found.background)


def judge_many(
    images: Sequence[Image.Image | np.ndarray],
    prompts: Sequence[Prompt],
    *,
    device: str | torch.device | None = None,
) -> list[Verdict]:
    """Judges each picture by the prompt in the same position, on a GPU if there is one and `device` names no other."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return [judge(image, prompt, device=device) for image, prompt in zip(images, prompts, strict=True)]


def evaluation_scenes(count: int = 600) -> list[Prompt]:
    """The held-out prompts of the everyday concepts, as `sana_sprint.evaluate.compositional` asks for them."""
    return evaluation_prompts(count)


def summarize(verdicts: Sequence[Verdict], prompts: Sequence[Prompt]) -> dict[str, float]:
    """The part of pictures that is correct: by task, and "overall" as the mean over the tasks, as GenEval has it.

    Raises:
        ValueError: there are none.
    """
    correct: dict[str, list[bool]] = {}
    for verdict, prompt in zip(verdicts, prompts, strict=True):
        correct.setdefault(prompt.scene.task, []).append(verdict.correct)
    if not correct:
        raise ValueError("no pictures to summarize")
    scores = {task: sum(correct[task]) / len(correct[task]) for task in TASKS if task in correct}
    return {**scores, "overall": sum(scores.values()) / len(scores)}


def _tensor(image: Image.Image | np.ndarray) -> Tensor:
    """fp32 (3,SIDE,SIDE) in [0,1]."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"picture is {image.dtype} of shape {image.shape}, expected uint8 (H,H,3)")
        image = Image.fromarray(image)
    if image.width != image.height:
        raise ValueError(f"picture is {image.width} x {image.height}, expected a square")
    image = image.convert("RGB")
    if image.width != SIDE:
        image = image.resize((SIDE, SIDE), Image.Resampling.BOX)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _wrong_style(layout: Layout, prompt: Prompt) -> str:
    if not prompt.says.names_style or layout.style == prompt.scene.style:
        return ""
    return f"the style is {layout.style}, not {prompt.scene.style}"


def _wrong_background(found: FoundBackground, prompt: Prompt) -> str:
    if not prompt.says.names_background or are_same(found.background, prompt.scene.background):
        return ""
    return f"the background is {_named(found.background)}, not {_named(prompt.scene.background)}"


def are_same(one: Background, other: Background) -> bool:
    """Whether no caption tells them apart: stripes and checks have no first colour."""
    if one.pattern != other.pattern:
        return False
    if one.pattern in ("stripes", "checks"):
        return {one.first, one.second} == {other.first, other.second}
    return (one.first, one.second) == (other.first, other.second)


def _named(background: Background) -> str:
    if background.pattern is None:
        return background.first
    return f"{background.first} and {background.second} {background.pattern}"


def _wrong_things(picture: Tensor, layout: Layout, scene: Scene) -> str:
    if len(layout.places) < len(scene.things):
        return "something is missing"
    for place, behind in zip(layout.places, layout.behind, strict=True):
        name = called(place.kind)
        if place.fit < MIN_FIT:
            return f"there is no whole {name}: its worse half fits {place.fit:.2f}"
        other = better_kind(picture, place, behind, layout.style)
        if other is not None:
            return f"it is rather {called(other)} than {name}"
    if layout.leftover > MAX_LEFTOVER:
        return f"there is something else: {layout.leftover:.0f} levels off the background"
    return ""


def _wrong_sizes(layout: Layout, prompt: Prompt) -> str:
    if not prompt.says.names_sizes:
        return ""
    sizes = {place.kind.size: place.size for place in layout.places}
    if sizes.keys() == {"small", "big"}:
        return "" if sizes["big"] >= MIN_RATIO * sizes["small"] else "the big thing is not bigger"
    if sizes.get("small", 0) > MAX_SMALL:
        return f"it is not small: {sizes['small']:.2f} of the picture"
    if sizes.get("big", 1) < MIN_BIG:
        return f"it is not big: {sizes['big']:.2f} of the picture"
    return ""


def _wrong_relation(layout: Layout, prompt: Prompt) -> str:
    """The places must be those of the scene's kinds."""
    relation = prompt.scene.relation
    if relation is None or not prompt.says.names_relation:
        return ""
    things = []
    for thing in prompt.scene.things:
        place = next(place for place in layout.places if place.kind == thing.kind)
        things.append(Thing(thing.kind, place.x, place.y, place.size))
    return "" if holds(relation, things, offset=MIN_OFFSET) else f"the things do not stand {relation}"
