"""WebDataset tars: files of one name belong together. Read at random: the headers say where each file lies."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sana_sprint.train.data.readers.base import (
    CAPTION_SUFFIXES,
    PICTURE_SUFFIXES,
    Record,
    Unreadable,
    sidecar_captions,
)


class _Place(NamedTuple):
    offset: int
    size: int


class _Entry(NamedTuple):
    tar: Path
    key: str
    files: dict[str, _Place]  # by suffix


class TarRecords:
    """See `records.Records`. The headers are read once, when the set is opened; pictures only when asked for.

    Raises:
        ValueError: a file is not an uncompressed, whole tar, or no tar has a picture.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.entries = [entry for path in paths for entry in _entries(path)]
        if not self.entries:
            raise ValueError(f"{paths[0]} has no pictures; looked for {', '.join(PICTURE_SUFFIXES)}")

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        return f"{self.entries[index].tar}:{self.entries[index].key}"

    def __getitem__(self, index: int) -> Record:
        entry = self.entries[index]
        with entry.tar.open("rb") as file:

            def read(suffix: str) -> bytes | None:
                if (place := entry.files.get(suffix)) is None:
                    return None
                file.seek(place.offset)
                return file.read(place.size)

            try:
                captions = sidecar_captions(read)
            except ValueError as error:
                raise Unreadable(self.name(index), f"its captions: {error}") from error
            picture = next(filter(None, map(read, _picture_suffixes(entry.files))), b"")
        return Record(self.name(index), picture, captions)


def _entries(path: Path) -> list[_Entry]:
    """The samples of one tar that have a picture, in the tar's order."""
    samples: dict[str, dict[str, _Place]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                # Everything from the first dot on is WebDataset's "extension": a.mask.png is not a's picture.
                suffix = (dot + suffix).lower()
                if member.isfile() and stem and suffix in (*PICTURE_SUFFIXES, *CAPTION_SUFFIXES):
                    files = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
                    files[suffix] = _Place(member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        raise ValueError(
            f"cannot read the tar {path} (it must be whole and uncompressed): {error}"
        ) from error
    return [_Entry(path, key, files) for key, files in samples.items() if _picture_suffixes(files)]


def _picture_suffixes(files: dict[str, _Place]) -> list[str]:
    return [suffix for suffix in PICTURE_SUFFIXES if suffix in files]
