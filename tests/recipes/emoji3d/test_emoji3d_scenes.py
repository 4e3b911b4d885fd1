"""Properties of scenes and their pictures, for any number."""

import math
from itertools import pairwise

import numpy as np
import pytest

from recipes.emoji3d import backgrounds
from recipes.emoji3d.artwork import HUES, artwork, sprite, takes_hue
from recipes.emoji3d.backgrounds import Background, draw_background
from recipes.emoji3d.check_judge import is_true
from recipes.emoji3d.concepts import concepts, named
from recipes.emoji3d.samples import autoencoder_128, evaluation_prompts, everyday_128, redraw
from recipes.emoji3d.scenes import (
    CORNERS,
    RELATIONS,
    TASKS,
    Kind,
    Scene,
    Thing,
    combinations,
    holds,
    is_held_out,
    render,
    sample_scene,
)
from recipes.emoji3d.sketches import coverage
from recipes.emoji3d.sketches import everyday_128 as lines_of


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [sample_scene(seed) for seed in range(400)]


def test_a_number_is_a_scene() -> None:
    for task in TASKS:
        assert sample_scene(5, task=task) == sample_scene(5, task=task)
        assert sample_scene(5, task=task) != sample_scene(6, task=task)


def test_training_has_none_of_the_held_out_combinations_and_the_evaluation_only_such(
    scenes: list[Scene],
) -> None:
    assert not any(is_held_out(*parts) for scene in scenes for parts in combinations(scene))
    for prompt in evaluation_prompts(90):
        assert is_held_out(*combinations(prompt.scene)[0])


def test_things_are_inside_and_overlap_little(scenes: list[Scene]) -> None:
    for scene in scenes:
        for thing in scene.things:
            assert thing.size / 2 <= min(thing.x, thing.y, 1 - thing.x, 1 - thing.y) + 1e-9
        for number, one in enumerate(scene.things):
            for other in scene.things[number + 1 :]:
                distance = math.hypot(one.x - other.x, one.y - other.y)
                assert distance > 0.45 * (one.size + other.size)


def test_places_and_sizes_are_free(scenes: list[Scene]) -> None:
    singles = [scene.things[0] for scene in scenes if scene.task == "single"]
    sizes, places = [thing.size for thing in singles], [thing.x for thing in singles]
    assert max(sizes) > 2 * min(sizes)
    assert max(places) - min(places) > 0.45


def test_every_relation_occurs_and_holds() -> None:
    found = {}
    for seed in range(150):
        scene = sample_scene(seed, task="position")
        assert scene.relation is not None
        assert holds(scene.relation, list(scene.things))
        found[scene.relation] = scene
    assert found.keys() == {*RELATIONS, *CORNERS, "between"}


def test_a_relation_does_not_hold_for_exchanged_things() -> None:
    cat, dog, bird = (Kind(named(name)) for name in ("cat", "dog", "bird"))
    left, right = Thing(cat, 0.2, 0.5, 0.3), Thing(dog, 0.8, 0.5, 0.3)
    middle = Thing(bird, 0.5, 0.5, 0.3)
    assert holds("left of", [left, right])
    assert holds("right of", [right, left])
    assert not holds("left of", [right, left])
    assert not holds("above", [left, right])
    assert holds("between", [middle, left, right])
    assert not holds("between", [left, middle, right])
    assert not holds("top left", [left])
    assert holds("bottom right", [Thing(cat, 0.8, 0.8, 0.3)])


def test_counts_go_from_two_to_five_and_some_scenes_count_two_kinds() -> None:
    counted = [sample_scene(seed, task="counting") for seed in range(100)]
    assert {len(scene.things) for scene in counted} == {2, 3, 4, 5}
    assert any(len(scene.kinds) == 2 for scene in counted)


def test_pictures_and_captions_of_a_sample_are_the_same_every_time() -> None:
    picture, captions = everyday_128(3)
    again, other = everyday_128(3)
    assert picture.shape == (128, 128, 3)
    assert picture.dtype == np.uint8
    assert np.array_equal(picture, again)
    assert captions == other
    assert len(set(captions)) > 1
    assert autoencoder_128(0).shape == autoencoder_128(1).shape == (128, 128, 3)


def test_the_same_scene_at_another_size_is_the_same_picture() -> None:
    scene = sample_scene(1, task="two")
    small = np.asarray(render(scene, 128), np.float32)
    large = np.asarray(render(scene, 256).resize((128, 128)), np.float32)
    # Edges are a pixel off at most; a thing that is elsewhere changes a tenth of the picture by some 100 levels.
    assert np.abs(small - large).mean() < 4


def test_recoloured_things_have_their_hue_and_keep_their_shape() -> None:
    for name in ("apple", "dog", "car"):
        emoji = named(name).emoji
        before = np.asarray(artwork(emoji, "flat", None, 96).convert("RGBA"))
        means = {}
        for hue in HUES:
            after = np.asarray(artwork(emoji, "flat", hue, 96).convert("RGBA"))
            assert np.array_equal(after[..., 3], before[..., 3])
            means[hue] = after[after[..., 3] > 200][:, :3].mean(0)
        assert means["blue"].argmax() == 2
        assert means["green"].argmax() == 1
        assert means["red"].argmax() == 0
        assert means["black"].sum() < means["brown"].sum() < means["white"].sum()


def test_things_without_colour_take_no_hue() -> None:
    assert takes_hue(named("apple").emoji, "flat")
    assert not takes_hue(named("zebra").emoji, "flat")
    assert sum(takes_hue(concept.emoji, "flat") for concept in concepts("everyday")) > 200


def test_a_sprite_has_the_asked_longer_side() -> None:
    for size in (20, 57, 110):
        assert max(sprite(named("bus").emoji, "flat", None, size, side=128).size) == size


def test_missing_artwork_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(FileNotFoundError, match=r"recipes\.emoji3d\.fetch"):
        artwork("\U0001f9ff\U0001f9ff", "3D", None, 64)


@pytest.mark.parametrize("pattern", backgrounds.PATTERNS)
def test_patterns_are_of_their_two_colours(pattern: str) -> None:
    for variant in range(backgrounds.num_variants(pattern)):
        drawn = draw_background(Background("black", "white", pattern, variant), 128)
        white = drawn[..., 0].mean() / 255
        # Dots cover pi 0.3^2 = 28%; the others are halves.
        assert abs(white - (0.283 if pattern == "dots" else 0.5)) < 0.08


def test_gradients_run_from_the_first_colour_to_the_second() -> None:
    for variant in range(2):
        drawn = draw_background(Background("black", "white", "gradient", variant), 64)[..., 0].astype(int)
        line = drawn[0] if (drawn[0] != drawn[0, 0]).any() else drawn[:, 0]
        assert all(later >= earlier for earlier, later in pairwise(line))


def test_whatever_a_caption_leaves_open_is_drawn_anew_and_the_caption_stays_true() -> None:
    for prompt in evaluation_prompts(54):
        drawn = [redraw(prompt, seed) for seed in range(4)]
        assert all(is_true(prompt, scene) for scene in drawn)
        assert len(set(drawn)) == len(drawn)


def test_a_sketch_follows_the_things_and_not_the_pattern() -> None:
    scene = next(scene for scene in (sample_scene(seed) for seed in range(99)) if scene.task == "pattern")
    covered = coverage(scene, 128)
    thing = scene.things[0]
    rows, columns = np.nonzero(covered[..., 0])
    assert abs(columns.mean() / 128 - thing.x) < 0.12
    assert abs(rows.mean() / 128 - thing.y) < 0.12
    picture, _ = everyday_128(2)
    lines = lines_of(picture, 2)
    assert lines.shape == picture.shape
    assert 0 < (lines > 127).mean() < 0.5
