"""The compositional judge of the emoji world: checks a picture against its caption, as GenEval does.

A picture is correct if it has exactly the caption's objects, whole, in the caption's relation, on the caption's
background, and nothing else. Its own error rates: `python -m recipes.emoji.check_judge`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from recipes.emoji import vocabulary as words
from recipes.emoji.matcher import Finding, Found, find
from recipes.emoji.scenes import SIZE, TASKS, Scene, sample_scene

# The thresholds lie between the weakest real picture at 28 dB and the strongest damaged one, see `check_judge`.
MIN_SCORE = 0.7  # lowest score of a whole object
MAX_LEFTOVER = 20.0  # levels, outside all objects
MAX_BACKGROUND_ERROR = 45.0  # levels, as an RGB distance; the nearest two backgrounds are 92 apart
MIN_OFFSET = 16.0  # pixels between the centres of objects in a relation, a quarter of what scenes have

_FIRST_EVALUATION_SEED = 1_000_000


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judge's result: `correct`, the objects found, and the `reason` if it is wrong ("" otherwise).

    `background` is the nearest known one's name, None if no known one is near.
    """

    correct: bool
    objects: tuple[Found, ...]
    background: str | None
    reason: str


def judge(image: Image.Image | np.ndarray, scene: Scene) -> Verdict:
    """Judges one picture of 128 x 128 pixels (a PIL image, or RGB uint8 (128,128,3)) by a scene's caption.

    Raises:
        ValueError: another size or type of picture.
    """
    return decide(find(_pixels(image)), scene)


def decide(finding: Finding, scene: Scene) -> Verdict:
    """Judges a picture's detected objects by a scene's caption."""
    background = _background_name(finding.background)
    reason = (
        _wrong_objects(finding, scene)
        or _not_whole(finding)
        or _wrong_relation(finding, scene)
        or _wrong_background(background, scene)
    )
    return Verdict(not reason, finding.objects, background, reason)


def judge_many(images: Sequence[Image.Image | np.ndarray], scenes: Sequence[Scene]) -> list[Verdict]:
    """Judges each picture by the scene in the same position."""
    return [judge(image, scene) for image, scene in zip(images, scenes, strict=True)]


def evaluation_scenes(count: int = 300) -> list[Scene]:
    """The held-out scenes that models are scored on, always the same: every task in turn."""
    return [
        sample_scene(_FIRST_EVALUATION_SEED + i // len(TASKS), held_out=True, task=TASKS[i % len(TASKS)])
        for i in range(count)
    ]


def summarize(verdicts: Sequence[Verdict], scenes: Sequence[Scene]) -> dict[str, float]:
    """Computes the share of correct pictures by task, and "overall" as the mean over tasks (as in GenEval)."""
    correct: dict[str, list[bool]] = {}
    for verdict, scene in zip(verdicts, scenes, strict=True):
        correct.setdefault(scene.task, []).append(verdict.correct)
    if not correct:
        raise ValueError("no pictures to summarize")
    scores = {task: sum(correct[task]) / len(correct[task]) for task in TASKS if task in correct}
    return {**scores, "overall": sum(scores.values()) / len(scores)}


def _pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    if isinstance(image, Image.Image):
        image = np.array(image.convert("RGB"))
    if image.shape != (SIZE, SIZE, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"picture is {image.dtype} of shape {image.shape}, expected uint8 of shape ({SIZE}, {SIZE}, 3)"
        )
    return image


def _background_name(color: tuple[float, float, float]) -> str | None:
    distances = {
        name: float(np.linalg.norm(np.subtract(color, known))) for name, known in words.BACKGROUNDS.items()
    }
    nearest = min(distances, key=distances.__getitem__)
    return nearest if distances[nearest] <= MAX_BACKGROUND_ERROR else None


def _wrong_objects(finding: Finding, scene: Scene) -> str:
    wanted = Counter(placed.kind for placed in scene.objects)
    found = Counter(thing.kind for thing in finding.objects)
    return "" if found == wanted else f"found {_listed(found)} instead of {_listed(wanted)}"


def _listed(kinds: Counter[str]) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items())) or "nothing"


def _not_whole(finding: Finding) -> str:
    for thing in finding.objects:
        if thing.score < MIN_SCORE:
            return f"the {thing.kind} is not whole: its worse half scores {thing.score:.2f}"
    if finding.leftover > MAX_LEFTOVER:
        return f"there is something else: {finding.leftover:.0f} levels off the background"
    return ""


def _wrong_relation(finding: Finding, scene: Scene) -> str:
    """Checks the relation; the found kinds must be those of the scene."""
    if scene.relation is None:
        return ""
    axis = "x" if scene.relation in ("left of", "right of") else "y"
    low, high = sorted(scene.objects, key=lambda placed: float(getattr(placed, axis)))
    place = {thing.kind: float(getattr(thing, axis)) for thing in finding.objects}
    if place[high.kind] - place[low.kind] >= MIN_OFFSET:
        return ""
    return f"the {low.kind} is not {'left of' if axis == 'x' else 'above'} the {high.kind}"


def _wrong_background(background: str | None, scene: Scene) -> str:
    if not scene.names_background or background == scene.background:
        return ""
    return f"the background is {background or 'of no known colour'}, not {scene.background}"
