"""The emoji world: scenes are fixed by their seed, captions tell the truth, and held-out combinations stay out."""

import itertools
import random
import re
from collections import Counter

import numpy as np
import pytest

from recipes.emoji import scenes
from recipes.emoji import vocabulary as words
from recipes.emoji.scenes import SIZE, TASKS, Scene, artwork, is_held_out, render, sample_scene

# Drawing a scene costs microseconds, so these can be many.
TRAINING = [sample_scene(seed) for seed in range(4000)]
TRAINING += [sample_scene(seed, task=task) for task in TASKS for seed in range(150)]
HELD_OUT = [sample_scene(seed, held_out=True, task=task) for seed in range(250) for task in TASKS]
ALL = [*TRAINING, *HELD_OUT]

# How captions are understood, written down independently of how they are made.
RELATION_WORDS = {
    "to the left of": "left of",
    "left of": "left of",
    "to the right of": "right of",
    "right of": "right of",
    "on top of": "above",
    "above": "above",
    "under": "below",
    "below": "below",
    "and": None,
}
# Where the first is -> its relation to the second, and where that is.
BY_PLACE = {
    "on the left": ("left of", "on the right"),
    "on the right": ("right of", "on the left"),
    "at the top": ("above", "at the bottom"),
    "at the bottom": ("below", "at the top"),
}
NUMBER_WORDS = {"a pair of": 1, "one pair of": 1, "a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}
SAME_IN_PLURAL = {"sheep", "fish", "broccoli", "scissors"}
OTHER_PLURALS = {"bus": "buses", "cup of coffee": "cups of coffee"}


def nouns(kind: str) -> tuple[str, ...]:
    return (kind, *words.SYNONYMS.get(kind, ()))


SINGULAR = {noun: kind for kind in words.KINDS for noun in nouns(kind)}
PLURAL = {
    noun if noun in SAME_IN_PLURAL else OTHER_PLURALS.get(noun, f"{noun}s"): kind
    for noun, kind in SINGULAR.items()
}


def counted(phrase: str) -> tuple[str, int]:
    """ "two buses" -> ("bus", 2); checks the article too."""
    match = re.fullmatch(r"(a pair of|one pair of|an|a|one|two|three|four) (.+)", phrase)
    assert match, phrase
    number = NUMBER_WORDS[match[1]]
    if match[1] in ("a", "an"):
        assert (match[1] == "an") == (match[2][0] in "aeiou"), phrase
    return (SINGULAR if number == 1 else PLURAL)[match[2]], number


def understood(caption: str) -> tuple[list[tuple[str, int]], str | None, str | None]:
    """(the counted kinds in the caption's order, relation, background)."""
    background = None
    if match := re.fullmatch(r"(\w+) background, (.+)", caption):
        background, caption = match[1], match[2]
    elif match := re.fullmatch(r"(.+) on (an?) (\w+) background", caption):
        assert (match[2] == "an") == (match[3][0] in "aeiou"), caption
        caption, background = match[1], match[3]
    caption = re.sub(r"^a (photo|picture) of ", "", caption)
    joints = "|".join(sorted(RELATION_WORDS, key=len, reverse=True))
    places = "|".join(BY_PLACE)
    if match := re.fullmatch(rf"({places}) (.+), ({places}) (.+)", caption):
        relation, other = BY_PLACE[match[1]]
        assert match[3] == other, caption
        return [counted(match[2]), counted(match[4])], relation, background
    if match := re.fullmatch(rf"(.+?) ({joints}) (.+)", caption):
        return [counted(match[1]), counted(match[3])], RELATION_WORDS[match[2]], background
    return [counted(caption)], None, background


def combination(scene: Scene) -> tuple[object, ...]:
    """Returns the combination that decides the split, per task, from the drawn scene."""
    kinds = [placed.kind for placed in scene.objects]
    if scene.task in ("single", "color"):
        return ("ground", kinds[0], scene.background)
    if scene.task == "counting":
        return ("count", kinds[0], len(kinds))
    if scene.relation:
        # In either order: another caption says "a dog right of a cat" of "a cat left of a dog".
        return ("relation", scene.relation in ("above", "below"), *sorted(kinds))
    return ("pair", *sorted(kinds))


def test_a_scene_is_a_function_of_its_seed_alone() -> None:
    random.seed(1)
    first = [sample_scene(seed, held_out=h) for seed in range(40) for h in (False, True)]
    random.seed(2)
    assert [sample_scene(seed, held_out=h) for seed in range(40) for h in (False, True)] == first
    assert len({scene.caption for scene in TRAINING[:100]}) > 90


def test_scenes_are_the_same_on_every_machine() -> None:
    # Trained weights, their evaluation and resumed trainings all depend on these: a change needs new weights.
    assert [scene.caption for scene in TRAINING[:3]] == [
        "a picture of a red car",
        "red background, a pizza",
        "three purple squares on a gray background",
    ]
    assert [sample_scene(seed, held_out=True).caption for seed in range(3)] == [
        "gray background, a picture of a white square below an apple",
        "a zebra below a cow on a blue background",
        "gray background, a picture of three crescent moons",
    ]


def test_captions_say_what_is_drawn() -> None:
    for scene in ALL:
        things, relation, background = understood(scene.caption)
        expected = Counter(placed.kind for placed in scene.objects)
        assert Counter(dict(things)) == expected, scene
        assert len(things) == len(expected), scene
        assert relation == scene.relation, scene
        assert background == (scene.background if scene.names_background else None), scene


def check_relation(scene: Scene, caption: str) -> None:
    ((first, _), (second, _)), relation, _ = understood(caption)
    at = {placed.kind: placed for placed in scene.objects}
    dx, dy = at[first].x - at[second].x, at[first].y - at[second].y
    directions = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}
    along, across = directions[relation]
    assert along > 50 > 10 > abs(across), (scene, caption)


def test_relations_hold_in_the_layout() -> None:
    related = [scene for scene in ALL if scene.relation]
    assert {scene.relation for scene in related} == set(scenes.RELATIONS)
    for scene in related:
        check_relation(scene, scene.caption)


def test_every_other_caption_of_a_scene_is_true_of_it_too() -> None:
    seen = set()
    for seed, scene in enumerate(TRAINING[:1000]):
        rng = random.Random(seed)
        for caption in (scenes.describe(scene, rng) for _ in range(4)):
            things, relation, background = understood(caption)
            assert Counter(dict(things)) == Counter(placed.kind for placed in scene.objects), caption
            assert background in (None, scene.background), caption
            assert (relation is None) == (scene.relation is None), caption
            if relation:
                check_relation(scene, caption)
            seen.add((scene.relation, relation, background is None))
    # Every relation is told from both sides, with and without the background.
    assert len(seen) == 2 * (1 + 4 * 2)


def test_tasks_have_their_content() -> None:
    for scene in ALL:
        kinds = [placed.kind for placed in scene.objects]
        distinct = set(kinds)
        assert len(distinct) == {"two": 2, "position": 2, "attribution": 2}.get(scene.task, 1)
        assert len(kinds) in {"single": (1,), "color": (1,), "counting": (2, 3, 4)}.get(scene.task, (2,))
        assert (scene.relation is not None) == (scene.task == "position")
        if scene.task == "attribution":
            assert distinct <= set(words.SHAPES)
            assert len({kind.split()[0] for kind in kinds}) == 2
        if scene.task in ("single", "color"):
            assert distinct <= set(words.OBJECTS if scene.task == "single" else words.SHAPES)


def test_held_out_combinations_never_appear_in_training() -> None:
    assert {scene.task for scene in TRAINING[:4000]} == set(TASKS)
    training, held_out = ({combination(scene) for scene in part} for part in (TRAINING, HELD_OUT))
    assert {kind for kind, *_ in training} == {kind for kind, *_ in held_out}
    assert len(held_out) > 400
    assert not training & held_out


def test_a_tenth_of_every_task_is_held_out() -> None:
    grounds = [(kind, ground) for kind in words.KINDS for ground in words.BACKGROUNDS]
    counts = [(kind, number) for kind in words.KINDS for number in (2, 3, 4)]
    pairs = [tuple(sorted(pair)) for pair in itertools.combinations(words.KINDS, 2)]
    for combinations in (grounds, counts, pairs):
        part = sum(is_held_out(*c) for c in combinations) / len(combinations)
        # Four standard deviations of a binomial with p = 0.1.
        assert abs(part - 0.1) < 4 * (0.09 / len(combinations)) ** 0.5


def test_held_out_single_objects_name_their_background() -> None:
    # Their combination is with the background: unnamed, the picture could be one that training has seen.
    single = [scene for scene in HELD_OUT if scene.task in ("single", "color")]
    assert single
    assert all(scene.names_background for scene in single)


def test_nothing_stands_on_a_background_it_vanishes_on() -> None:
    assert {scene.background for scene in ALL} == set(words.BACKGROUNDS)
    for scene in ALL:
        for placed in scene.objects:
            assert not words.clashes(placed.kind, scene.background)
            assert placed.kind.split()[0] != scene.background or placed.kind not in words.SHAPES


def test_every_kind_can_be_seen_wherever_it_may_stand(emoji_font) -> None:
    for kind in words.KINDS:
        pixels = np.asarray(artwork(kind, 54), np.float32)
        opacity = pixels[..., 3:] / 255
        for ground, color in words.BACKGROUNDS.items():
            if not words.clashes(kind, ground):
                contrast = np.square((pixels[..., :3] - color) * opacity).sum() / (
                    3 * np.square(opacity).sum()
                )
                # An autoencoder at 28 dB is off by 10 levels.
                assert contrast**0.5 > 20, (kind, ground)


def test_every_kind_has_its_own_artwork(emoji_font) -> None:
    drawn = {kind: artwork(kind, 64) for kind in words.KINDS}
    for kind, sprite in drawn.items():
        assert sprite.mode == "RGBA"
        assert max(sprite.size) == 64, kind
        assert np.asarray(sprite.getchannel("A")).mean() > 20, kind
    # A glyph that the font lacks comes out as the same empty box as every other missing one.
    assert len({sprite.tobytes() for sprite in drawn.values()}) == len(words.KINDS) == 75


def test_every_noun_means_one_kind() -> None:
    every = [noun for kind in words.KINDS for noun in nouns(kind)]
    assert len(every) == len(set(every))
    assert [words.plural(noun) for noun in SINGULAR] == list(PLURAL)
    assert words.with_article("orange") == "an orange"
    assert words.with_article("scissors") == "a pair of scissors"


def box(placed: scenes.Placed) -> tuple[float, float, float, float]:
    sprite = artwork(placed.kind, round(placed.size))
    return (
        placed.x - sprite.width / 2,
        placed.y - sprite.height / 2,
        placed.x + sprite.width / 2,
        placed.y + sprite.height / 2,
    )


def test_objects_are_inside_the_picture_and_apart(emoji_font) -> None:
    for scene in ALL[::10]:
        boxes = [box(placed) for placed in scene.objects]
        for left, top, right, bottom in boxes:
            # Centres are rounded to whole pixels when drawn.
            assert min(left, top) > -1, scene
            assert max(right, bottom) < SIZE + 1, scene
        for a, b in itertools.combinations(boxes, 2):
            assert a[0] > b[2] - 1 or b[0] > a[2] - 1 or a[1] > b[3] - 1 or b[1] > a[3] - 1, scene


def test_a_picture_is_its_objects_on_its_background(emoji_font) -> None:
    for scene in ALL[::97]:
        picture = np.asarray(render(scene))
        assert picture.shape == (SIZE, SIZE, 3)
        differs = (picture != words.BACKGROUNDS[scene.background]).any(-1)
        y, x = np.mgrid[:SIZE, :SIZE]
        for left, top, right, bottom in map(box, scene.objects):
            inside = (x >= left - 1) & (x < right + 1) & (y >= top - 1) & (y < bottom + 1)
            assert differs[inside].any(), scene
            differs &= ~inside
        assert not differs.any(), scene


def test_training_samples(emoji_font) -> None:
    picture, captions = scenes.training_scene(7)
    assert captions[0] == TRAINING[7].caption
    assert len(captions) == scenes.NUM_CAPTIONS
    np.testing.assert_array_equal(picture, np.asarray(render(TRAINING[7])))
    for index in (6, 7):  # an ordinary picture, a crowded one
        sample = scenes.training_picture(index)
        assert sample.shape == (SIZE, SIZE, 3)
        assert sample.dtype == np.uint8
        np.testing.assert_array_equal(sample, scenes.training_picture(index))
    assert (scenes.training_picture(7) != scenes.training_picture(9)).any()


def test_a_missing_font_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(scenes, "FONT_PATH", tmp_path / "absent.ttf")
    scenes.font.cache_clear()
    try:
        with pytest.raises(FileNotFoundError, match=r"absent\.ttf.*fonts-noto-color-emoji"):
            scenes.font()
    finally:
        scenes.font.cache_clear()
