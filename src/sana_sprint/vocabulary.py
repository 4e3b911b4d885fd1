"""The words that a small model was taught: a text file in its folder, and which words of a prompt are not among them.

A model trained on few words draws something whatever it is asked, also where it has never seen a word of the prompt. Its
vocabulary lets it say so. Models of the published kind have none: their text encoder knows a language.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

FILE_NAME = "vocabulary.txt"
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Words in lower case."""

    words: frozenset[str]

    @classmethod
    def of(cls, captions: Iterable[str]) -> Vocabulary:
        """The words of these captions."""
        return cls(frozenset(word for caption in captions for word in split(caption)))

    def untaught(self, text: str) -> tuple[str, ...]:
        """The words of a text that are not among these, in its order, each once."""
        return tuple(dict.fromkeys(word for word in split(text) if word not in self.words))

    def write(self, folder: Path) -> None:
        """Writes the words into a model's folder, one a line."""
        lines = "\n".join(sorted(self.words))
        (folder / FILE_NAME).write_text(f"{lines}\n", encoding="utf-8")


def read(folder: Path) -> Vocabulary | None:
    """The vocabulary in a model's folder, None if it has none."""
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    return Vocabulary(frozenset(path.read_text(encoding="utf-8").split()))


def split(text: str) -> list[str]:
    """The words of a text in lower case: letters and digits, with apostrophes and hyphens inside.

    >>> split("A T-Rex, on orange!")
    ['a', 't-rex', 'on', 'orange']
    """
    return _WORD.findall(text.lower())
