"""The things that can be drawn: each an emoji with a name, other words for it, and words kept for the evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

EVERYDAY = Path(__file__).with_name("everyday.txt")


@dataclass(frozen=True, slots=True)
class Concept:
    """One thing.

    `names` are its name and the other words of training captions; `unseen_names` are those that only held-out captions
    use. `form` says how it takes an article and a number: "" counts as usual, "mass" takes "some", "pair" takes "a
    pair of".
    """

    emoji: str
    name: str
    names: tuple[str, ...]
    unseen_names: tuple[str, ...]
    form: str


@cache
def everyday() -> tuple[Concept, ...]:
    """The first tier, in the file's order."""
    return _read(EVERYDAY)


def _read(path: Path) -> tuple[Concept, ...]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return tuple(_parse(line) for line in lines if line and not line.startswith("#"))


def _parse(line: str) -> Concept:
    """A line as the table's head describes it."""
    head, more, unseen = (part.strip() for part in (line + " | | ").split("|")[:3])
    emoji, _, name = head.partition(" ")
    name, _, form = name.rstrip("]").partition(" [")
    return Concept(emoji, name, (name, *_words(more)), _words(unseen), form)


def _words(listed: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in listed.split(",") if word.strip())
