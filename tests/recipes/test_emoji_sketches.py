"""The emoji world with objects anywhere, its sketches, and how pictures drawn from them are scored."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.emoji import sketches
from recipes.emoji import vocabulary as words
from recipes.emoji.control_evaluate import NEAR, scored, sketch, verdict
from recipes.emoji.matcher import Found
from recipes.emoji.scenes import NUM_CAPTIONS, SIZE, Placed, Scene, artwork, is_held_out, render, sample_scene
from recipes.emoji.sketches import MARGIN, condition, drawing, free_scene, training_scene
from sana_sprint import controls

TRAINING = [free_scene(seed) for seed in range(2000)]
HELD_OUT = [free_scene(seed, held_out=True) for seed in range(400)]
ALL = [*TRAINING, *HELD_OUT]
CAT_AND_DOG = Scene(
    "two", (Placed("cat", 32, 40, 54), Placed("dog", 96, 90, 50)), "blue", True, None, "a cat and a dog"
)


def combination(scene: Scene) -> tuple[str, ...]:
    kinds = sorted(placed.kind for placed in scene.objects)
    return (*kinds, scene.background) if len(kinds) == 1 else tuple(kinds)


def test_a_scene_is_a_function_of_its_seed_alone() -> None:
    random.seed(5)
    assert [free_scene(seed) for seed in range(20)] == TRAINING[:20]
    assert [free_scene(seed, held_out=True) for seed in range(20)] == HELD_OUT[:20]
    assert TRAINING[0] != TRAINING[1]


def test_held_out_combinations_are_never_trained_on() -> None:
    assert all(is_held_out(*combination(scene)) for scene in HELD_OUT)
    assert not any(is_held_out(*combination(scene)) for scene in TRAINING)
    # Nor are they by the student, whose scenes stand in rows.
    rows = [sample_scene(seed, task=task) for seed in range(1500) for task in ("single", "color", "two")]
    assert not {combination(scene) for scene in HELD_OUT} & {combination(scene) for scene in rows}
    # The combination of one object is with its background, which the caption must therefore name.
    assert all(scene.names_background for scene in HELD_OUT)


def test_captions_name_what_is_drawn() -> None:
    assert {len(scene.objects) for scene in ALL} == {1, 2}
    assert {placed.kind for scene in ALL for placed in scene.objects} == set(words.KINDS)
    for scene in ALL:
        for placed in scene.objects:
            assert not words.clashes(placed.kind, scene.background)
            assert any(noun in scene.caption for noun in (placed.kind, *words.SYNONYMS.get(placed.kind, ())))
        assert (f"{scene.background} background" in scene.caption) == scene.names_background


def test_objects_are_inside_the_picture_and_apart() -> None:
    for scene in ALL:
        for placed in scene.objects:
            reach = placed.size / 2 + MARGIN
            assert reach <= placed.x <= SIZE - reach
            assert reach <= placed.y <= SIZE - reach
        for a, b in itertools.combinations(scene.objects, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) >= (a.size + b.size) / 2 + MARGIN
    # They do stand anywhere: in each quarter of the picture about a quarter of them.
    centres = np.array([(placed.x, placed.y) for scene in ALL for placed in scene.objects])
    quarters = np.bincount((centres > SIZE / 2) @ [1, 2], minlength=4) / len(centres)
    assert quarters.min() > 0.2  # of 3000 draws, with a deviation of 0.008


# From here on pictures are drawn, so the font is needed.


def box_of(lines: np.ndarray) -> np.ndarray:
    """(left, top, right, bottom) of what is not black."""
    rows, columns = np.flatnonzero(lines.any(axis=1)), np.flatnonzero(lines.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def test_training_samples(emoji_font) -> None:
    picture, captions = training_scene(7)
    np.testing.assert_array_equal(picture, np.asarray(render(TRAINING[7])))
    assert captions[0] == TRAINING[7].caption
    assert len(captions) == NUM_CAPTIONS


def line_pixels(lines: np.ndarray, placed: Placed) -> int:
    """Counts the pixels at or near this object."""
    reach = placed.size / 2 + 8
    top, left = max(0, round(placed.y - reach)), max(0, round(placed.x - reach))
    return int((lines[top : round(placed.y + reach), left : round(placed.x + reach), 0] > 127).sum())


def test_drawings_show_every_object_where_it_is(emoji_font, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketches, "KINDS_OF_LINES", ("drawing",))
    for position, scene in enumerate(TRAINING[:150]):
        lines = condition(np.asarray(render(scene)), position)
        for placed in scene.objects:
            # A quarter of the outline of a disc of its size, a pixel wide, at least.
            assert line_pixels(lines, placed) > 0.8 * placed.size, (position, placed)
        if len(scene.objects) == 1:
            (placed,) = scene.objects
            sprite = artwork(placed.kind, round(placed.size))
            half = np.array([sprite.width, sprite.height]) / 2
            centre = np.array([placed.x, placed.y])
            expected = np.concatenate([centre - half, centre + half])
            # A hand's error of up to three deviations of 3.5 pixels, half a pen of 5, and thin ends rounded off.
            assert np.abs(box_of(lines[..., 0]) - expected).max() < 20, (position, placed)


@pytest.mark.parametrize("kind", ["drawing", "canny", "softedge"])
def test_lines_are_white_on_black(emoji_font, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(sketches, "KINDS_OF_LINES", (kind,))
    lines = condition(np.asarray(render(CAT_AND_DOG)), 3)
    assert lines.shape == (SIZE, SIZE, 3)
    assert lines.dtype == np.uint8
    assert (lines == lines[..., :1]).all()
    assert 0.5 < (lines == 0).mean() < 1
    assert all(line_pixels(lines, placed) > 0.8 * placed.size for placed in CAT_AND_DOG.objects)


def test_a_condition_depends_on_picture_and_position_alone(emoji_font) -> None:
    picture = np.asarray(render(CAT_AND_DOG))
    random.seed(1)
    torch.manual_seed(1)
    first = [condition(picture, position) for position in range(12)]
    random.seed(2)
    torch.manual_seed(2)
    for position, expected in enumerate(first):
        np.testing.assert_array_equal(condition(picture, position), expected)
    assert len({each.tobytes() for each in first}) >= 8  # edges are the same if their width is
    assert (condition(np.asarray(render(TRAINING[0])), 0) != first[0]).any()


def test_a_sketch_is_seen_as_it_was_trained_on(emoji_font) -> None:
    """The public way from black strokes on white to a condition ends at the lines of training."""
    for number, scene in enumerate(HELD_OUT[:6]):
        lines = drawing(np.asarray(render(scene)), random.Random(f"sketch-{number}"))
        seen = controls.control_picture(sketch(scene, number), "scribble", SIZE, SIZE)
        assert torch.equal((seen[0, 0] > 0).float(), lines)


def test_the_score_accepts_real_pictures_and_no_others(emoji_font) -> None:
    scenes = [*HELD_OUT[:5], CAT_AND_DOG]
    pictures = [render(scene) for scene in scenes]
    assert scored(pictures, scenes) == {"place": 1.0, "kind": 1.0, "both": 1.0}
    empty = Image.new("RGB", (SIZE, SIZE), words.BACKGROUNDS["blue"])
    assert scored([empty], [CAT_AND_DOG]) == {"place": 0.0, "kind": 0.0, "both": 0.0}


def test_place_and_kind_are_scored_apart() -> None:
    def found(*things: tuple[str, float, float]) -> list[Found]:
        return [Found(kind, x, y, 52.0, 0.9) for kind, x, y in things]

    right = found(("cat", 35, 44), ("dog", 96 + NEAR, 90))
    for things, *truth in (
        (right, True, True, True),
        (found(("cat", 32, 40), ("bear", 96, 90)), True, False, False),
        (found(("dog", 32, 40), ("cat", 96, 90)), True, True, False),  # swapped
        (found(("cat", 32, 40), ("dog", 96 + NEAR + 1, 90)), False, True, False),
        (right[:1], False, False, False),
    ):
        assert verdict(things, CAT_AND_DOG) == dict(zip(("place", "kind", "both"), truth, strict=True))
    one_more = [*right, *found(("cat", 64, 10))]
    assert verdict(one_more, CAT_AND_DOG) == {"place": True, "kind": False, "both": False}


def test_kinds_of_lines_all_come_up(emoji_font, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    for name in ("drawing", "canny", "soft_edges"):
        original = getattr(sketches, name)
        monkeypatch.setattr(
            sketches, name, lambda *a, name=name, original=original: (used.append(name), original(*a))[1]
        )
    picture = np.asarray(render(CAT_AND_DOG))
    for position in range(30):
        condition(picture, position)
    assert set(used) == {"drawing", "canny", "soft_edges"}
    assert used.count("drawing") > 10  # three in five
