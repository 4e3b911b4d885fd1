"""Names of things, and the captions of scenes."""

import random
import re
from collections import Counter

import pytest

from recipes.emoji3d.artwork import HUES
from recipes.emoji3d.captions import describe
from recipes.emoji3d.concepts import Noun, concepts, named, plural
from recipes.emoji3d.samples import Prompt, evaluation_prompts
from recipes.emoji3d.scenes import TASKS, sample_scene

NUM_SCENES = 300


def test_the_tiers_are_as_large_as_promised() -> None:
    assert len(concepts("everyday")) >= 320
    assert len(concepts("all")) >= 1000


def test_no_word_names_two_things() -> None:
    words = Counter(
        noun.text for concept in concepts("all") for noun in (*concept.nouns, *concept.unseen_nouns)
    )
    assert [word for word, count in words.items() if count > 1] == []


def test_every_everyday_thing_has_a_word_for_the_evaluation_alone() -> None:
    assert [concept.name for concept in concepts("everyday") if not concept.unseen_nouns] == []


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("cat", "cats"),
        ("glass of milk", "glasses of milk"),
        ("person in bed", "people in bed"),
        ("police officer", "police officers"),
        ("mermaid", "mermaids"),
        ("old woman", "old women"),
        ("tropical fish", "tropical fish"),
        ("computer mouse", "computer mice"),
        ("kitchen knife", "kitchen knives"),
        ("cherry blossom", "cherry blossoms"),
        ("butterfly", "butterflies"),
        ("monkey", "monkeys"),
        ("hand pointing left", "hands pointing left"),
        ("loaf of bread", "loaves of bread"),
        ("moon with a lit left half", "moons with a lit left half"),
        ("human brain", "human brains"),
    ],
)
def test_plurals(one: str, many: str) -> None:
    assert plural(one) == many


@pytest.mark.parametrize(
    ("noun", "adjectives", "one", "three"),
    [
        (Noun("apple", "count"), "", "an apple", "three apples"),
        (Noun("apple", "count"), "big green", "a big green apple", "three big green apples"),
        (Noun("unicorn", "count"), "", "a unicorn", "three unicorns"),
        (Noun("hourglass", "count"), "", "an hourglass", "three hourglasses"),
        (Noun("scissors", "pair"), "orange", "a pair of orange scissors", "three pairs of orange scissors"),
        (Noun("popcorn", "mass"), "blue", "some blue popcorn", None),
        (Noun("the statue of liberty", "bare"), "", "the statue of liberty", None),
        (Noun("the statue of liberty", "bare"), "orange", "an orange statue of liberty", None),
    ],
)
def test_articles_and_numbers(noun: Noun, adjectives: str, one: str, three: str | None) -> None:
    assert noun.one(adjectives) == one
    if three is None:
        with pytest.raises(ValueError, match="takes no number"):
            noun.many("three", adjectives)
    else:
        assert noun.many("three", adjectives) == three


def test_a_name_that_there_is_not_is_an_error() -> None:
    with pytest.raises(ValueError, match="no concept is named 'unheard of'"):
        named("unheard of")


def whole(words: str, text: str) -> bool:
    return re.search(rf"\b{re.escape(words)}\b", text) is not None


def test_captions_say_what_they_claim_to_say() -> None:
    for seed in range(NUM_SCENES):
        scene = sample_scene(seed)
        says = describe(scene, random.Random(seed))
        background = scene.background
        for kind, number in scene.kinds:
            assert kind.hue is None or whole(kind.hue, says.text)
            spoken = {2: "two", 3: "three", 4: "four", 5: "five"}.get(number, "")
            assert number == 1 or whole(spoken, says.text) or whole(str(number), says.text), says.text
            nouns = [form for noun in kind.concept.nouns for form in (noun.text, plural(noun.text))]
            assert any(whole(noun.removeprefix("the "), says.text) for noun in nouns), says.text
        if says.names_background:
            assert whole(background.first, says.text)
            assert background.second is None or whole(background.second, says.text)
        if says.names_style:
            assert whole("3D" if scene.style == "3D" else "flat", says.text)
        if says.names_sizes and (sized := [kind.size for kind, _ in scene.kinds if kind.size]):
            expected = {"small": "small|little|tiny", "big": "big|large|huge"}
            assert all(re.search(expected[size], says.text) for size in sized), says.text


def test_a_caption_of_a_relation_has_the_things_in_its_order() -> None:
    scene = next(
        scene
        for scene in (sample_scene(seed, task="position") for seed in range(100))
        if scene.relation == "left of"
    )
    left, right = (kind.concept.nouns for kind, _ in scene.kinds)

    def first(nouns: tuple[Noun, ...], text: str) -> int:
        found = [text.find(noun.text.removeprefix("the ")) for noun in nouns]
        return min(place for place in found if place >= 0)

    for seed in range(60):
        text = describe(scene, random.Random(seed), must_name=("relation",)).text
        is_reversed = whole("right of", text) or "the right of" in text
        assert (first(left, text) < first(right, text)) != is_reversed, text


def test_training_never_has_the_evaluations_phrasings_and_synonyms() -> None:
    openings = ("draw", "show me", "i want", "please", "here you see")
    for seed in range(NUM_SCENES):
        scene = sample_scene(seed)
        text = describe(scene, random.Random(seed)).text
        assert not text.startswith(openings)
        assert not re.search(r"accompanied|together|plus|against|backdrop|underneath|flanked", text)
        for kind, _ in scene.kinds:
            known = " ".join(noun.text for noun in kind.concept.nouns)
            unseen = [noun.text for noun in kind.concept.unseen_nouns if not whole(noun.text, known)]
            assert not any(whole(noun, text) for noun in unseen), text


@pytest.mark.parametrize("wording", ["phrasings", "synonyms"])
def test_unseen_wordings_are_of_the_same_scenes_in_other_words(wording: str) -> None:
    known, other = evaluation_prompts(90), evaluation_prompts(90, wording=wording)
    assert [prompt.scene for prompt in known] == [prompt.scene for prompt in other]
    same = sum(one.caption == two.caption for one, two in zip(known, other, strict=True))
    assert same < 9


def test_evaluation_prompts_ask_for_their_task() -> None:
    def asks(prompt: Prompt) -> bool:
        says, task = prompt.says, prompt.scene.task
        named_by = {
            "single": says.names_background,
            "pattern": says.names_background,
            "position": says.names_relation,
            "style": says.names_style,
            "size": says.names_sizes,
        }
        hued = [kind.hue for kind, _ in prompt.scene.kinds]
        return named_by.get(task, True) and (task not in ("color", "attribution") or all(hued))

    prompts = evaluation_prompts(180)
    assert all(map(asks, prompts))
    assert Counter(prompt.scene.task for prompt in prompts) == dict.fromkeys(TASKS, 20)
    assert set(HUES) >= {kind.hue for prompt in prompts for kind, _ in prompt.scene.kinds if kind.hue}
