"""Records: the form in which every stored set of pictures is read, an encoded picture and its captions each."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Sample = tuple[
    np.ndarray, tuple[str, ...]
]  # uint8 (H,W,3), and one or more captions, each true of the picture

PICTURE_SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
CAPTION_SUFFIXES = (".txt", ".caption", ".json")  # beside a picture; the first that is there is taken
PICTURE_COLUMNS = ("image", "picture", "file_name", "path", "jpg", "png", "webp")  # likewise, of a table
_CAPTION_COLUMN = re.compile(r"(captions?|text|prompt)_?\d*", re.IGNORECASE)


class Unreadable(ValueError):  # noqa: N818  (it is what the sample is)
    """One sample that cannot be used: `name` says which, `reason` why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


@dataclass(frozen=True)
class Record:
    """One picture as it is stored, and its captions, none of them empty."""

    name: str  # path, or path and row
    picture: bytes
    captions: tuple[str, ...]


class Records(Protocol):
    """A stored set."""

    def __len__(self) -> int:
        """How many records there are."""

    def name(self, index: int) -> str:
        """The name of a record in messages."""

    def __getitem__(self, index: int) -> Record:
        """Reads one record. Raises `Unreadable` or OSError if that one is damaged."""


def captions_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """All captions of a table's row or a JSON object.

    They are in the columns `caption`, `captions`, `text` and `prompt`, also with a number behind as in `caption_2`;
    each holds a text or a list of texts.
    """
    found: list[Any] = []
    for column in filter(is_caption_column, row):
        value = row[column]
        found += value if isinstance(value, list) else [value]
    return cleaned(found)


def is_caption_column(name: str) -> bool:
    """Whether `captions_of` reads this column."""
    return _CAPTION_COLUMN.fullmatch(name) is not None


def sidecar_captions(read: Callable[[str], bytes | None]) -> tuple[str, ...]:
    """Captions from the files beside a picture; `read` maps a suffix to such a file's bytes, None without one.

    In `.txt` and `.caption` every line is a caption; `.json` holds one object, read by `captions_of`.

    Raises:
        ValueError: the file is not UTF-8, or not a JSON object.
    """
    for suffix in CAPTION_SUFFIXES:
        if (data := read(suffix)) is None:
            continue
        text = data.decode("utf-8-sig")
        if suffix != ".json":
            return cleaned(text.splitlines())
        row = json.loads(text)
        if not isinstance(row, dict):
            raise ValueError("the .json beside the picture is not an object")
        return captions_of(row)
    return ()


def cleaned(texts: list[Any]) -> tuple[str, ...]:
    """The texts without surrounding space, without empty ones and repetitions, in their order."""
    stripped = (text.strip() for text in texts if isinstance(text, str))
    return tuple(dict.fromkeys(text for text in stripped if text))


def picture_column(columns: list[str]) -> str | None:
    """The column that holds pictures or their paths, if there is one."""
    return next((name for name in PICTURE_COLUMNS if name in columns), None)
