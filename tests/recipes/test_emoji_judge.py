"""The emoji judge may score models only if it is right about pictures whose truth is known.

The whole measurement (`python -m recipes.emoji.check_judge`) takes minutes and runs under `-m slow`; the others are parts.
"""

import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.emoji import check_judge
from recipes.emoji import vocabulary as words
from recipes.emoji.judge import Verdict, decide, evaluation_scenes, judge, judge_many, summarize
from recipes.emoji.matcher import Finding, Found, find
from recipes.emoji.scenes import TASKS, Placed, Scene, is_held_out, render

CAT_LEFT_OF_DOG = Scene(
    "position",
    (Placed("cat", 32, 64, 54), Placed("dog", 96, 64, 54)),
    "blue",
    True,
    "left of",
    "a cat left of a dog",
)
BLUE = (30.0, 70.0, 190.0)


def found(*things: tuple[str, float, float], score: float = 0.95) -> tuple[Found, ...]:
    return tuple(Found(kind, x, y, 53.0, score) for kind, x, y in things)


def seen(
    objects: tuple[Found, ...], background: tuple[float, float, float] = BLUE, leftover: float = 10.0
) -> Finding:
    return Finding(objects, background, leftover)


CAT_AND_DOG = found(("cat", 30, 66), ("dog", 96, 64))


def test_decides_by_objects_relation_background_and_rest() -> None:
    assert decide(seen(CAT_AND_DOG), CAT_LEFT_OF_DOG) == Verdict(True, CAT_AND_DOG, "blue", "")
    wrong = {
        "found 1 cat instead of 1 cat, 1 dog": seen(CAT_AND_DOG[:1]),
        "found nothing instead of 1 cat, 1 dog": seen(()),
        "found 2 cat, 1 dog instead of": seen((*CAT_AND_DOG, *found(("cat", 64, 10)))),
        "found 1 bear, 1 cat instead of": seen(found(("cat", 30, 66), ("bear", 96, 64))),
        "the cat is not left of the dog": seen(found(("dog", 32, 64), ("cat", 96, 64))),
        "the cat is not whole": seen(found(("cat", 30, 66), ("dog", 96, 64), score=0.3)),
        "there is something else": seen(CAT_AND_DOG, leftover=70),
        "the background is red, not blue": seen(CAT_AND_DOG, (190, 20, 30)),
        "the background is of no known colour, not blue": seen(CAT_AND_DOG, (0, 255, 255)),
    }
    for reason, finding in wrong.items():
        verdict = decide(finding, CAT_LEFT_OF_DOG)
        assert not verdict.correct
        assert reason in verdict.reason


@pytest.mark.parametrize("relation", ["left of", "right of", "above", "below"])
def test_relations(relation: str) -> None:
    # Scenes list their objects from left to right and from top to bottom, whatever the caption says first.
    vertical = relation in ("above", "below")
    objects = (Placed("cat", 64, 32, 54), Placed("dog", 64, 96, 54)) if vertical else CAT_LEFT_OF_DOG.objects
    scene = replace(CAT_LEFT_OF_DOG, relation=relation, objects=objects)
    apart = {"x": (30, 100), "y": (64, 64)}
    if vertical:
        apart = {"x": apart["y"], "y": apart["x"]}
    places = list(zip(apart["x"], apart["y"], strict=True))
    right = found(("cat", *places[0]), ("dog", *places[1]))
    swapped = found(("dog", *places[0]), ("cat", *places[1]))
    turned = found(("cat", *places[0][::-1]), ("dog", *places[1][::-1]))
    assert [decide(seen(objects), scene).correct for objects in (right, swapped, turned)] == [
        True,
        False,
        False,
    ]


def test_an_unnamed_background_may_be_any() -> None:
    scene = replace(CAT_LEFT_OF_DOG, names_background=False)
    assert decide(seen(CAT_AND_DOG, (0, 255, 255)), scene) == Verdict(True, CAT_AND_DOG, None, "")
    assert decide(seen(CAT_AND_DOG, (190, 20, 30)), scene).correct


def test_every_background_is_known_when_slightly_off() -> None:
    for name, color in words.BACKGROUNDS.items():
        for sign in (-1, 1):
            shifted = tuple(min(255.0, max(0.0, c + 20 * sign)) for c in color)
            assert decide(seen((), shifted), CAT_LEFT_OF_DOG).background == name


def test_evaluation_scenes_are_fixed_held_out_and_balanced() -> None:
    scenes = evaluation_scenes()
    assert len(scenes) == 300
    assert Counter(scene.task for scene in scenes) == dict.fromkeys(TASKS, 50)
    assert evaluation_scenes(30) == scenes[:30]
    assert len({scene.caption for scene in scenes}) > 280
    for scene in scenes:
        kinds = [placed.kind for placed in scene.objects]
        if scene.task in ("single", "color"):
            assert is_held_out(kinds[0], scene.background)
        if scene.task == "counting":
            assert is_held_out(kinds[0], len(kinds))


def test_summary_is_the_mean_over_tasks() -> None:
    scenes = [replace(CAT_LEFT_OF_DOG, task=task) for task in ("two", "two", "two", "single", "color")]
    verdicts = [Verdict(correct, (), None, "") for correct in (True, False, False, True, True)]
    scores = summarize(verdicts, scenes)
    assert list(scores) == ["single", "two", "color", "overall"]
    assert scores == pytest.approx({"single": 1.0, "two": 1 / 3, "color": 1.0, "overall": (2 + 1 / 3) / 3})
    with pytest.raises(ValueError, match="no pictures"):
        summarize([], [])
    with pytest.raises(ValueError, match="zip"):
        summarize(verdicts, scenes[:2])


@pytest.mark.parametrize(
    "picture",
    [np.zeros((64, 64, 3), np.uint8), np.zeros((128, 128, 3), np.float32), Image.new("RGB", (64, 64))],
)
def test_other_pictures_are_refused(picture) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 of shape \(128, 128, 3\)"):
        judge(picture, CAT_LEFT_OF_DOG)


def test_degraded_pictures_are_at_28_db() -> None:
    picture = np.full((128, 128, 3), 128, np.uint8)
    picture[40:90, 30:80] = (200, 60, 40)
    error = np.square(check_judge.degrade(picture, 0).astype(float) - picture).mean()
    # Nothing here is clipped; rounding to whole levels adds 1/12 to an error of 103.
    assert 10 * math.log10(255**2 / error) == pytest.approx(28, abs=0.02)


def test_truth_of_captions_about_other_scenes() -> None:
    swapped = replace(CAT_LEFT_OF_DOG, objects=(Placed("dog", 32, 64, 54), Placed("cat", 96, 64, 54)))
    assert check_judge.is_true(CAT_LEFT_OF_DOG, CAT_LEFT_OF_DOG)
    assert not check_judge.is_true(CAT_LEFT_OF_DOG, swapped)
    assert not check_judge.is_true(CAT_LEFT_OF_DOG, replace(CAT_LEFT_OF_DOG, background="red"))
    assert check_judge.is_true(replace(CAT_LEFT_OF_DOG, relation=None), swapped)
    assert check_judge.is_true(
        replace(CAT_LEFT_OF_DOG, names_background=False), replace(CAT_LEFT_OF_DOG, background="red")
    )


# From here on pictures are drawn, so the font is needed.


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    # Matching one picture is many small steps: a second thread makes them slower where cores are busy.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return check_judge.both_splits(36)


@pytest.fixture(scope="module")
def findings(emoji_font, scenes: list[Scene]) -> list[Finding]:
    return [find(check_judge.picture(scene)) for scene in scenes]


def refused(verdicts: Iterable[Verdict]) -> list[str]:
    return [verdict.reason for verdict in verdicts if not verdict.correct]


def test_real_pictures_are_accepted(scenes: list[Scene], findings: list[Finding]) -> None:
    # The slow measurement has all of 360 pictures right.
    assert not refused(decide(f, s) for f, s in zip(findings, scenes, strict=True))


def test_objects_are_found_where_they_are(scenes: list[Scene], findings: list[Finding]) -> None:
    for scene, finding in zip(scenes, findings, strict=True):
        left = list(finding.objects)
        for placed in scene.objects:
            nearest = min(left, key=lambda thing: abs(thing.x - placed.x) + abs(thing.y - placed.y))
            left.remove(nearest)
            assert nearest.kind == placed.kind
            # Places are on a grid of 2 pixels and drawn at whole ones; sizes are tried 6% apart.
            assert max(abs(nearest.x - placed.x), abs(nearest.y - placed.y)) < 3
            assert nearest.size == pytest.approx(placed.size, rel=0.06)


def test_other_captions_are_rejected(scenes: list[Scene], findings: list[Finding]) -> None:
    verdicts = [
        decide(finding, caption).correct
        for caption in scenes
        for shown, finding in zip(scenes, findings, strict=True)
        if not check_judge.is_true(caption, shown)
    ]
    assert len(verdicts) > 1000
    assert not any(verdicts)


def test_pictures_as_from_a_small_model_are_accepted(emoji_font, scenes: list[Scene]) -> None:
    rng = random.Random(0)
    for seed, scene in enumerate(scenes[9:27]):
        picture = check_judge.degrade(check_judge.picture(check_judge.displace(scene, rng)), seed)
        assert judge(picture, scene).reason == ""


def test_near_misses_are_rejected(emoji_font, scenes: list[Scene]) -> None:
    names = set()
    for seed, scene in enumerate(scenes[::5]):
        for name, miss in check_judge.near_misses(scene, random.Random(seed)).items():
            names.add(name)
            assert not judge(render(miss), scene).correct, (name, scene, miss)
    assert names == {
        "one more", "one less", "a stranger", "look-alike", "swapped", "other axis", "background",
    }  # fmt: skip


def test_damaged_pictures_are_rejected(emoji_font, scenes: list[Scene]) -> None:
    for seed, scene in enumerate(scenes[::5]):
        for name, picture in check_judge.damaged(scene, random.Random(seed)).items():
            assert not judge(picture, scene).correct, (name, scene)


def test_judging_many_is_judging_each(emoji_font, scenes: list[Scene]) -> None:
    pictures = [render(scene) for scene in scenes[:2]]
    assert judge_many(pictures, scenes[:2]) == [
        judge(np.array(p), s) for p, s in zip(pictures, scenes, strict=False)
    ]
    with pytest.raises(ValueError, match="zip"):
        judge_many(pictures, scenes[:1])


@pytest.mark.slow
def test_the_whole_measurement(emoji_font) -> None:
    scenes = check_judge.both_splits(360)
    rates: dict[str, list[bool]] = {}
    for (name, _), correct in check_judge.measure(scenes).items():
        rates.setdefault(name, []).extend(correct)
    part = {name: sum(correct) / len(correct) for name, correct in rates.items()}
    assert part.pop("real") >= 0.98
    assert part.pop("28 dB") >= 0.95
    assert part.pop("28 dB, displaced") >= 0.95
    assert all(accepted < 0.02 for accepted in part.values()), part
