"""The second world's judge on pictures whose truth is known; `python -m recipes.emoji3d.check_judge` measures it on hundreds."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from recipes.emoji3d import judge as judges
from recipes.emoji3d.background_finder import find_background
from recipes.emoji3d.backgrounds import Background, draw_background
from recipes.emoji3d.captions import Caption
from recipes.emoji3d.check_judge import degrade, is_true, near_misses, picture
from recipes.emoji3d.concepts import named
from recipes.emoji3d.judge import Verdict, are_same, judge, judge_many, summarize
from recipes.emoji3d.samples import Prompt, evaluation_prompts
from recipes.emoji3d.scenes import TASKS, Kind, Scene, Thing
from recipes.emoji3d.variety import entropy, variety
from sana_sprint.evaluate.compositional import import_judge

CAT, DOG = Kind(named("cat")), Kind(named("dog"))
BLUE = Background("blue")
SCENE = Scene("position", "flat", (Thing(CAT, 0.25, 0.5, 0.4), Thing(DOG, 0.75, 0.5, 0.4)), BLUE, "left of")
SAYS = Caption("a flat cat left of a dog on a blue background", True, True, True, True)
PROMPT = Prompt(SCENE, SAYS)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return evaluation_prompts(len(TASKS))


def test_real_pictures_are_correct_also_blurred_and_noisy(prompts: list[Prompt]) -> None:
    images = [degrade(picture(prompt.scene), number) for number, prompt in enumerate(prompts)]
    verdicts = judge_many(images, prompts)
    assert [verdict.reason for verdict in verdicts] == [""] * len(prompts)
    assert summarize(verdicts, prompts) == {**dict.fromkeys(TASKS, 1.0), "overall": 1.0}


def test_near_misses_are_wrong(prompts: list[Prompt]) -> None:
    rng = random.Random(0)
    for number, prompt in enumerate(prompts):
        misses = {
            name: miss
            for name, miss in near_misses(prompt.scene, rng).items()
            if not is_true(prompt, miss) and name != "look-alike"  # some are twins
        }
        name = sorted(misses)[number % len(misses)]
        assert not judge(picture(misses[name]), prompt).correct, (name, prompt.caption)


@pytest.mark.parametrize(
    ("shown", "reason"),
    [
        (replace(SCENE, things=SCENE.things[:1]), "there is no whole"),
        (
            replace(SCENE, things=(replace(SCENE.things[0], x=0.75), replace(SCENE.things[1], x=0.25))),
            "left of",
        ),
        (replace(SCENE, background=Background("red")), "the background is red, not blue"),
        (
            replace(SCENE, background=Background("blue", "white", "dots", 0)),
            "the background is blue and white dots, not blue",
        ),
        (replace(SCENE, style="3D"), "the style is 3D, not flat"),
        (
            replace(SCENE, things=(*SCENE.things, Thing(Kind(named("star")), 0.5, 0.15, 0.25))),
            "something else",
        ),
        (
            replace(
                SCENE, things=(replace(SCENE.things[0], kind=replace(CAT, hue="green")), SCENE.things[1])
            ),
            "there is no whole",
        ),
    ],
)
def test_what_is_wrong_is_said(shown: Scene, reason: str) -> None:
    verdict = judge(picture(shown), PROMPT)
    assert not verdict.correct
    assert reason in verdict.reason


def test_what_the_caption_leaves_open_is_free() -> None:
    open_prompt = Prompt(SCENE, Caption("a cat and a dog", False, False, False, False))
    shown = replace(
        SCENE,
        style="3D",
        background=Background("yellow", "red", "stripes", 5),
        things=(Thing(DOG, 0.3, 0.3, 0.35), Thing(CAT, 0.7, 0.7, 0.35)),
    )
    verdict = judge(picture(shown), open_prompt)
    assert verdict.reason == ""
    assert verdict.style == "3D"
    assert are_same(verdict.background, Background("red", "yellow", "stripes"))


def test_sizes_are_judged_where_they_are_named() -> None:
    small = Scene("size", "flat", (Thing(replace(CAT, size="small"), 0.5, 0.5, 0.35),), BLUE, None)
    large = replace(small, things=(replace(small.things[0], size=0.85),))
    says = Caption("a small cat", False, False, True, False)
    assert judge(picture(small), Prompt(small, says)).correct
    assert "not small" in judge(picture(large), Prompt(small, says)).reason
    assert judge(picture(large), Prompt(small, replace(says, text="a cat", names_sizes=False))).correct


@pytest.mark.parametrize(
    "background",
    [
        Background("orange"),
        Background("black", "white", "stripes", 7),
        Background("red", "white", "dots", 3),
        Background("yellow", "blue", "checks", 2),
        Background("blue", "pink", "gradient", 1),
    ],
)
def test_backgrounds_are_found_behind_a_thing(background: Background) -> None:
    shown = replace(SCENE, background=background)
    pixels = torch.from_numpy(picture(shown).copy()).permute(2, 0, 1).float() / 255
    found = find_background(pixels)
    assert are_same(found.background, background)
    real = torch.from_numpy(draw_background(background, 128)).permute(2, 0, 1).float() / 255
    # A gradient's colours are fitted behind the things too: a level or two off.
    assert (found.pixels - real).abs().mean() < 0.01


def test_a_picture_of_twice_the_size_is_judged_alike() -> None:
    from recipes.emoji3d.scenes import render

    assert judge(render(SCENE, 256), PROMPT).correct


def test_other_things_than_square_pictures_are_errors() -> None:
    with pytest.raises(ValueError, match="expected a square"):
        judge(np.zeros((128, 64, 3), np.uint8), PROMPT)
    with pytest.raises(ValueError, match="expected uint8"):
        judge(np.zeros((128, 128, 3), np.float32), PROMPT)
    with pytest.raises(ValueError, match="no pictures"):
        summarize([], [])


def test_it_is_a_judge_for_the_evaluation_command() -> None:
    assert import_judge("recipes.emoji3d.judge") is judges
    scenes = judges.evaluation_scenes(9)
    assert [prompt.caption for prompt in scenes] == [prompt.says.text for prompt in scenes]


def test_variety_is_the_entropy_of_what_is_open() -> None:
    assert entropy("abab") == 1
    assert entropy([]) == 0
    says = Caption("a cat", False, False, False, False)
    single = Scene("single", "flat", (Thing(CAT, 0.5, 0.5, 0.4),), BLUE, None)
    prompts = [Prompt(single, says)] * 4
    verdicts = [
        Verdict(True, "", (), "flat", Background(first)) for first in ("blue", "red", "green", "white")
    ]
    assert variety(verdicts, prompts) == {"background": 2, "style": 0, "place": 0}
    named_background = [Prompt(single, replace(says, names_background=True))] * 4
    assert variety(verdicts, named_background)["background"] == 0
