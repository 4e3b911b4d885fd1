"""The things that can be drawn: each an emoji with a name, other words for it, and words kept for the evaluation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TIERS = ("everyday", "further")  # each a table beside this file
_VOWEL_SOUND = re.compile(
    r"(?!u[bfkns]i|euro|one|ewe|ufo|u$|utensil)[aeiou]|hourglass|x-ray|mp3|suv", re.IGNORECASE
)
_IRREGULAR = {
    "sheep": "sheep",
    "fish": "fish",
    "deer": "deer",
    "moose": "moose",
    "bison": "bison",
    "mouse": "mice",
    "goose": "geese",
    "ox": "oxen",
    "foot": "feet",
    "tooth": "teeth",
    "man": "men",
    "woman": "women",
    "child": "children",
    "person": "people",
    "knife": "knives",
    "loaf": "loaves",
    "leaf": "leaves",
    "wolf": "wolves",
    "elf": "elves",
    "die": "dice",
    "dice": "dice",
    "cattle": "cattle",
    "cactus": "cacti",
    "series": "series",
    "aircraft": "aircraft",
    "spacecraft": "spacecraft",
    "shrimp": "shrimp",
    "squid": "squid",
    "trout": "trout",
}
# A noun ends before the first of these: "glass of milk" is "glasses of milk", "person in bed" "people in bed".
_AFTER_NOUN = re.compile(
    r" (?:of|with|in|on|at|from|for|over|and|going|pointing|making|being|lying|taking|landing|holding|blowing|licking"
    r"|sticking|surrounded|rolling|covering|crossing|raising|tipping|doing|playing|riding|walking|running|kneeling"
    r"|standing|bowing|facepalming|getting|skiing|fencing|surfing|swimming|rowing|bouncing|lifting|wearing|gesturing"
    r"|who|behind|by|up|down|to|that|facing|laughing|crying|shrieking) "
)
_MARKS = {"": "count", "+": "mass", "&": "pair", "=": "bare"}


@dataclass(frozen=True, slots=True)
class Noun:
    """A word or words for a thing, and how it takes an article and a number.

    `form` is "count" ("a cat", "two cats"), "mass" ("some popcorn"), "pair" ("a pair of scissors", "two pairs of
    scissors") or "bare" ("santa claus").
    """

    text: str
    form: str

    @property
    def can_count(self) -> bool:
        """Whether it takes a number."""
        return self.form in ("count", "pair")

    def one(self, adjectives: str = "", *, article: str = "a") -> str:
        """One of it: "a cat", "the big blue cat", "some popcorn", "a pair of red scissors", "santa claus".

        Args:
            adjectives: words before the noun, joined by spaces.
            article: "a", "the", "one" or "" (none).
        """
        words = f"{adjectives} {self.text}".strip()
        if self.form == "bare":
            bare = self.text.removeprefix("the ")
            return f"{_article(adjectives)} {adjectives} {bare}" if adjectives else self.text
        if self.form == "mass":
            return f"the {words}" if article == "the" else f"some {words}" if article else words
        if self.form == "pair":
            words = f"pair of {words}"
        if article == "a":
            return f"{_article(words)} {words}"
        return f"{article} {words}".strip()

    def many(self, number: str, adjectives: str = "") -> str:
        """So many of it: "two big cats", "three pairs of scissors". Raises ValueError if it takes no number."""
        if not self.can_count:
            raise ValueError(f"{self.text!r} takes no number")
        if self.form == "pair":
            return f"{number} pairs of {adjectives} {self.text}".replace("  ", " ")
        return f"{number} {adjectives} {plural(self.text)}".replace("  ", " ")


@dataclass(frozen=True, slots=True)
class Concept:
    """One thing: its emoji, the nouns of training captions (its name first), and those of held-out captions alone."""

    emoji: str
    nouns: tuple[Noun, ...]
    unseen_nouns: tuple[Noun, ...]

    @property
    def name(self) -> str:
        """Its name, without an article."""
        return self.nouns[0].text


@cache
def concepts(tier: str) -> tuple[Concept, ...]:
    """A tier's concepts in its file's order.

    Args:
        tier: one of `TIERS`, or "all" for all of them.
    """
    if tier == "all":
        return tuple(concept for each in TIERS for concept in concepts(each))
    text = Path(__file__).with_name(f"{tier}.txt").read_text(encoding="utf-8")
    return tuple(_parse(line) for line in text.splitlines() if line and not line.startswith("#"))


@cache
def named(name: str) -> Concept:
    """The concept with this name. Raises ValueError if there is none."""
    found = next((concept for concept in concepts("all") if concept.name == name), None)
    if found is None:
        raise ValueError(f"no concept is named {name!r}")
    return found


@cache
def tier_of(concept: Concept) -> str:
    """The smallest tier that `concepts` takes and that has this concept."""
    return TIERS[0] if concept in concepts(TIERS[0]) else "all"


def plural(noun: str) -> str:
    """The plural of a noun and what follows it: "glass of milk" -> "glasses of milk", "fish" -> "fish"."""
    ending = _AFTER_NOUN.search(f"{noun} ")
    head, rest = (noun[: ending.start()], noun[ending.start() :]) if ending else (noun, "")
    *before, last = head.split(" ")
    stem, hyphen, final = last.rpartition("-")
    return " ".join([*before, stem + hyphen + _plural_word(final)]) + rest


def _plural_word(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    for ending in ("woman", "man", "person", "child", "fish", "mouse"):
        if word.endswith(ending) and word not in ("human", "shaman", "talisman"):
            return word.removesuffix(ending) + _IRREGULAR[ending]
    if word.endswith(("s", "x", "z", "ch", "sh")) or word in (
        "tomato",
        "potato",
        "mango",
        "volcano",
        "tornado",
        "hero",
    ):
        return word + "es"
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


def _article(words: str) -> str:
    return "an" if _VOWEL_SOUND.match(words) else "a"


def _parse(line: str) -> Concept:
    """A line as the tables' heads describe it."""
    head, more, unseen = (part.strip() for part in f"{line} | | ".split("|")[:3])
    emoji, _, name = head.partition(" ")
    return Concept(emoji, _nouns(f"{name}, {more}"), _nouns(unseen))


def _nouns(listed: str) -> tuple[Noun, ...]:
    return tuple(_noun(word.strip()) for word in listed.split(",") if word.strip())


def _noun(word: str) -> Noun:
    mark = word[0] if word[0] in _MARKS else ""
    return Noun(word[len(mark) :], _MARKS[mark])
