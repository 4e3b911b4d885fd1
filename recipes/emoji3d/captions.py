"""Captions as a person would write them, and what each of them says about its scene.

Training captions use the first of `WORDINGS`; "phrasings" and "synonyms" are for the evaluation alone: sentence forms,
and words for things, that no training caption has.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from recipes.emoji3d.backgrounds import COLORS, Background
from recipes.emoji3d.concepts import Noun
from recipes.emoji3d.scenes import CORNERS, Kind, Scene

WORDINGS = ("known", "phrasings", "synonyms")
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
_SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "big": ("big", "big", "large", "huge")}
_OPENINGS = {
    "known": ("", "", "", "", "", "a picture of ", "an image of ", "a photo of ", "an emoji of "),
    "phrasings": ("", "draw ", "show me ", "i want ", "please draw ", "here you see "),
}
_STYLE_WORDS = {
    "known": {
        "3D": ("in 3D", "in 3D style", "as a 3D rendering", "3D"),
        "flat": ("in flat style", "as a flat drawing", "flat style", "as a flat emoji"),
    },
    "phrasings": {
        "3D": ("rendered in 3D", "as a three-dimensional object"),
        "flat": ("drawn flat", "as a two-dimensional flat icon"),
    },
}
_TOGETHER = {
    "known": ("{a} and {b}", "{a} and {b}", "{a} with {b}", "{a} next to {b}", "{a} beside {b}", "{a}, {b}"),
    "phrasings": ("both {a} and {b}", "{a} together with {b}", "{a} plus {b}", "{a} accompanied by {b}"),
}
_RELATION_WORDS = {
    "known": {
        "left of": (
            "{a} left of {b}",
            "{a} to the left of {b}",
            "{a} on the left and {b} on the right",
            "on the left {a}, on the right {b}",
        ),
        "above": (
            "{a} above {b}",
            "{a} over {b}",
            "{a} on top of {b}",
            "{a} at the top and {b} at the bottom",
            "at the top {a}, at the bottom {b}",
        ),
        "right of": ("{a} right of {b}", "{a} to the right of {b}"),
        "below": ("{a} below {b}", "{a} under {b}", "{a} beneath {b}"),
        "between": ("{a} between {b} and {c}", "{a} in the middle, between {b} and {c}"),
    },
    "phrasings": {
        "left of": ("{a} on the left side of {b}", "{a} standing left of {b}", "{b} with {a} on its left"),
        "above": ("{a} higher than {b}", "{a} placed above {b}", "{b} with {a} over it"),
        "right of": ("{a} on the right side of {b}", "{b} with {a} on its right"),
        "below": ("{a} underneath {b}", "{b} with {a} below it"),
        "between": ("{b} and {c} with {a} between them", "{a} flanked by {b} and {c}"),
    },
}
_CORNER_WORDS = {
    "known": ("{a} in the {corner} corner", "{a} at the {corner}", "{a} in the {other}", "{corner}: {a}"),
    "phrasings": ("{a} placed in the {corner}", "in the {corner} corner there is {a}"),
}
_COUNTED = {
    "known": ("{a}", "{a}", "{a}", "a group of {a}"),
    "phrasings": ("exactly {a}", "a set of {a}", "a total of {a}"),
}
# {c} is the colours' own phrase.
_BEHIND = {
    "known": (
        "{s} on {c}",
        "{s} on {c}",
        "{s} on {c}",
        "{s} in front of {c}",
        "{s} with {c} behind",
        "{p}, {s}",
    ),
    "phrasings": ("{s} against {c}", "{s}, and behind it {c}", "{s} that has {c} as its backdrop"),
}
_COLOR_WORDS = frozenset({*COLORS, "golden", "silver"})
_ALL_SIZES = frozenset(word for words in _SIZE_WORDS.values() for word in words)
_OPPOSITE = {"right of": "left of", "below": "above", "left of": "right of", "above": "below"}


@dataclass(frozen=True, slots=True)
class Caption:
    """A text, and what it says of its scene beside the kinds with their hues and numbers, which it always says."""

    text: str
    names_style: bool
    names_background: bool
    names_sizes: bool
    names_relation: bool


def describe(
    scene: Scene, rng: random.Random, *, wording: str = "known", must_name: tuple[str, ...] = ()
) -> Caption:
    """Draws a caption that is true of a scene.

    Args:
        scene: what to describe.
        rng: decides what the caption leaves open, and its words.
        wording: one of `WORDINGS`.
        must_name: of "style", "background", "sizes" and "relation", what the caption must name; the others it may.
    """
    says = Caption(
        text="",
        names_style="style" in must_name or rng.random() < 0.25,
        names_background="background" in must_name or rng.random() < 0.55,
        names_sizes="sizes" in must_name or rng.random() < 0.7,
        names_relation="relation" in must_name or rng.random() < 0.85,
    )
    return replace(says, text=_sentence(scene, says, rng, wording))


def must_name(task: str) -> tuple[str, ...]:
    """The parts that captions of the evaluation name, so that they ask for the task: see `describe`."""
    named = {
        "single": "background",
        "position": "relation",
        "style": "style",
        "size": "sizes",
        "pattern": "background",
    }
    return (named[task],) if task in named else ()


def _sentence(scene: Scene, says: Caption, rng: random.Random, wording: str) -> str:
    form = "phrasings" if wording == "phrasings" else "known"
    phrases = [_phrase(kind, number, says, rng, wording) for kind, number in scene.kinds]
    subject = _arranged(phrases, scene, says, rng, form)
    if says.names_style:
        subject = f"{subject} {rng.choice(_STYLE_WORDS[form][scene.style])}"
    opening = rng.choice(_OPENINGS[form])
    if not says.names_background:
        return opening + subject
    behind = _background_words(scene.background, rng)
    template = rng.choice(_BEHIND[form])
    if "{p}" in template:  # it comes first, without an article
        return template.format(p=behind.removeprefix("a ").removeprefix("an "), s=subject)
    return opening + template.format(s=subject, c=behind)


def _phrase(kind: Kind, number: int, says: Caption, rng: random.Random, wording: str) -> str:
    """The kind with its number, size and hue."""
    noun = _noun(kind, number, says, rng, wording)
    size = rng.choice(_SIZE_WORDS[kind.size]) if kind.size and says.names_sizes else ""
    adjectives = " ".join(word for word in (size, kind.hue) if word)
    if number == 1:
        return noun.one(adjectives, article=rng.choice(("a", "a", "a", "a", "a", "the", "one", "")))
    spelled = NUMBERS[number] if rng.random() < 0.85 else str(number)
    form = "phrasings" if wording == "phrasings" else "known"
    return rng.choice(_COUNTED[form]).format(a=noun.many(spelled, adjectives))


def _noun(kind: Kind, number: int, says: Caption, rng: random.Random, wording: str) -> Noun:
    """The first fitting noun half of the time (the name, mostly), else another word for the concept.

    Beside a hue no noun with a colour fits, beside a size none with a size; and a number needs one that can be counted.
    """
    nouns = kind.concept.nouns
    unseen = kind.concept.unseen_nouns if wording == "synonyms" else ()
    clashing = (_COLOR_WORDS if kind.hue else frozenset()) | (
        _ALL_SIZES if kind.size and says.names_sizes else frozenset()
    )
    countable = [noun for noun in (*unseen, *nouns) if noun.can_count or number == 1]
    fitting = [noun for noun in countable if clashing.isdisjoint(noun.text.split())] or countable
    preferred = [noun for noun in fitting if noun in unseen] or fitting
    return preferred[0] if rng.random() < 0.5 else rng.choice(preferred)


def _arranged(phrases: list[str], scene: Scene, says: Caption, rng: random.Random, form: str) -> str:
    """The phrases as one subject, with the relation if it is said."""
    if not says.names_relation or scene.relation is None:
        return _listed(phrases, rng, form)
    words = _RELATION_WORDS[form]
    relation, (first, *others) = scene.relation, phrases
    if relation in CORNERS:
        other = relation.replace("top", "upper").replace("bottom", "lower")
        return rng.choice(_CORNER_WORDS[form]).format(a=first, corner=relation, other=other)
    if relation == "between":
        rng.shuffle(others)
        return rng.choice(words[relation]).format(a=first, b=others[0], c=others[1])
    other = others[0]
    if rng.random() < 0.4:
        relation, first, other = _OPPOSITE[relation], other, first
    return rng.choice(words[relation]).format(a=first, b=other)


def _listed(phrases: list[str], rng: random.Random, form: str) -> str:
    shuffled = rng.sample(phrases, len(phrases))
    if len(shuffled) == 1:
        return shuffled[0]
    if len(shuffled) == 2:
        return rng.choice(_TOGETHER[form]).format(a=shuffled[0], b=shuffled[1])
    return f"{', '.join(shuffled[:-1])} and {shuffled[-1]}"


def _background_words(background: Background, rng: random.Random) -> str:
    """ "a blue background", "a background of red and white stripes", and so on."""
    first, second = background.first, background.second
    if background.pattern in ("stripes", "checks") and rng.random() < 0.5:  # neither colour comes first
        assert second is not None
        first, second = second, first
    forms: dict[str | None, tuple[str, ...]] = {
        None: ("a {a} background", "a {a} background", "a plain {a} background", "{a}"),
        "gradient": (
            "a gradient from {a} to {b}",
            "a {a} to {b} gradient",
            "a background that fades from {a} to {b}",
        ),
        "stripes": (
            "{a} and {b} stripes",
            "a {a} and {b} striped background",
            "a background with {a} and {b} stripes",
        ),
        "dots": (
            "a {a} background with {b} dots",
            "{a} with {b} dots",
            "{b} dots on {a}",
            "{b} polka dots on a {a} background",
        ),
        "checks": (
            "{a} and {b} checks",
            "a {a} and {b} checkered background",
            "a {a} and {b} checkerboard",
        ),
    }
    text = rng.choice(forms[background.pattern]).format(a=first, b=second)
    return text.replace("a orange", "an orange")
