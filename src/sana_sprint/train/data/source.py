"""Samples by index, from a stored set or a function: sample i is the same on every machine, so a resumed run needs only its step."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from sana_sprint.train.data.pictures import decode
from sana_sprint.train.data.readers.base import Records, Sample, Unreadable
from sana_sprint.train.data.readers.folder import FolderRecords
from sana_sprint.train.data.readers.parquet import ParquetRecords
from sana_sprint.train.data.readers.table import TableRecords
from sana_sprint.train.data.readers.tar import TarRecords
from sana_sprint.train.data.sampler import shuffled

VALIDATION_START = 1_000_000_000  # sample indices from here on are for validation
MAX_BAD_FRACTION = 0.02  # of a set's samples; more than this is a fault of the set, not of a few files
_HELD_OUT_EVERY, _MAX_HELD_OUT = 50, 128
_FUNCTION_SAMPLED_EVERY, _FUNCTION_SAMPLED_MOST = 128, 16
_TABLES = ("metadata.jsonl", "metadata.csv")  # in a folder of pictures


class Source(Protocol):
    """An endless stream of samples (`source(index)`), and the set behind it, by position."""

    @property
    def is_concurrent(self) -> bool:
        """Whether several threads may ask for samples."""

    @property
    def training(self) -> Sequence[int]:
        """Positions of the set that are trained on."""

    def __call__(self, index: int) -> Sample:
        """Sample of the stream: for training below `VALIDATION_START`, for validation from there on."""

    def sample(self, position: int) -> Sample:
        """Sample of the set. Raises `Unreadable`."""

    def name(self, position: int) -> str:
        """The name of a sample in messages."""

    def digest(self, positions: Sequence[int]) -> str:
        """A hash of what these samples are made from."""


def open_source(
    source: str, *, report: Callable[[str], None] | None = None, max_bad: float = MAX_BAD_FRACTION
) -> Source:
    """Opens a source of samples, each a picture as uint8 (H,W,3) and its captions.

    Args:
        source: one of

            * a folder of pictures, with captions beside them in `.txt`, `.caption` or `.json`;
            * a `.jsonl` or `.csv` file with a picture's path and captions in each row; or the folder of a
              `metadata.jsonl` or `metadata.csv`;
            * a `.parquet` file or a folder of them, with pictures as bytes or paths;
            * a `.tar` file (WebDataset) or a folder of them;
            * "module:function", where the function maps an index to the picture alone, or with a caption, or with
              several that are all true of it.
        report: receives a line about every picture that is skipped, once.
        max_bad: part of a stored set that may be unreadable.

    Raises:
        ValueError: the source cannot be found, has no pictures, or is of several kinds.
        ImportError: it is a parquet file and pyarrow is missing.
    """
    path = Path(source)
    if not path.exists() and ":" in source:
        return FunctionSource(source)
    return RecordSource(_open_records(path), report=report or (lambda _: None), max_bad=max_bad)


class RecordSource:
    """See `Source`: a stored set, endlessly, in a new order each epoch.

    Of the first 6400 records every 50th is held out for validation; a set of less than 50 has none to spare, and
    validation shows training pictures. In the place of an unreadable picture stands the next readable one.
    """

    def __init__(self, records: Records, *, report: Callable[[str], None], max_bad: float) -> None:
        self.records = records
        self.skipped: dict[str, str] = {}  # name -> reason
        self._report, self._max_bad = report, max_bad
        self._skipping = threading.Lock()
        # The same ones in a set that has grown at its end: what was shown stays unseen, and cached parts stay valid.
        self.validation = range(_HELD_OUT_EVERY - 1, len(records), _HELD_OUT_EVERY)[:_MAX_HELD_OUT]
        self.training: Sequence[int] = sorted(set(range(len(records))) - set(self.validation))

    @property
    def is_concurrent(self) -> bool:
        return True

    def __call__(self, index: int) -> Sample:
        """Raises ValueError when too many pictures have turned out unreadable."""
        if index >= VALIDATION_START:
            positions: Sequence[int] = self.validation or self.training
            start = (index - VALIDATION_START) % len(positions)
        else:
            positions = self.training
            start = int(shuffled(range(index, index + 1), len(positions), seed=0))
        for offset in range(len(positions)):
            try:
                return self.sample(positions[(start + offset) % len(positions)])
            except Unreadable as error:
                self._skip(error)
        raise ValueError(f"none of {len(positions)} pictures can be read; the first: {self._first()}")

    def sample(self, position: int) -> Sample:
        try:
            record = self.records[position]
        except OSError as error:
            raise Unreadable(self.name(position), error.strerror or str(error)) from error
        return decode(record), record.captions or ("",)

    def name(self, position: int) -> str:
        return self.records.name(position)

    def digest(self, positions: Sequence[int]) -> str:
        """Of the encoded pictures and their captions: every byte, wherever the set lies and whatever it is called."""
        digest = hashlib.sha256()
        for position in positions:
            try:
                record = self.records[position]
            except (Unreadable, OSError):
                digest.update(b"unreadable")
                continue
            digest.update(hashlib.sha256(record.picture).digest())
            digest.update(hashlib.sha256(json.dumps(record.captions).encode()).digest())
        return digest.hexdigest()

    def _skip(self, error: Unreadable) -> None:
        with self._skipping:
            if error.name in self.skipped:
                return
            self.skipped[error.name] = error.reason
            self._report(f"skipped {error}")
            refuse_too_many(self.skipped, len(self.records), self._max_bad)

    def _first(self) -> str:
        return next(f"{name}: {reason}" for name, reason in self.skipped.items())


class FunctionSource:
    """See `Source`: an endless set, made sample by sample."""

    training = range(VALIDATION_START)
    is_concurrent = False  # a function need not be safe to call from several threads

    def __init__(self, source: str) -> None:
        self.source = source
        module, _, name = source.partition(":")
        try:
            self.module = importlib.import_module(module)
            self.function: Callable[[int], Any] = getattr(self.module, name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"data source {source!r} cannot be imported: {error}") from error

    def __call__(self, index: int) -> Sample:
        return self.sample(index)

    def sample(self, position: int) -> Sample:
        made = self.function(position)
        pixels, captions = made if isinstance(made, tuple) else (made, "")
        return pixels, (captions,) if isinstance(captions, str) else tuple(captions)

    def name(self, position: int) -> str:
        return f"{self.source}({position})"

    def digest(self, positions: Sequence[int]) -> str:
        """Of the module's text, and of every 128th sample, 16 at most: what the module imports may change too."""
        digest = hashlib.sha256(f"{self.source} {positions[0]} {len(positions)}".encode())
        digest.update(inspect.getsource(self.module).encode())
        for position in positions[::_FUNCTION_SAMPLED_EVERY][:_FUNCTION_SAMPLED_MOST]:
            pixels, captions = self.sample(position)
            digest.update(pixels.tobytes() + json.dumps(captions).encode())
        return digest.hexdigest()


def refuse_too_many(bad: dict[str, str], total: int, max_bad: float) -> None:
    """Raises ValueError if more than this part of a set is bad; names the first three."""
    if len(bad) > max_bad * total:
        first = "; ".join(f"{name}: {reason}" for name, reason in list(bad.items())[:3])
        raise ValueError(
            f"{len(bad)} of {total} samples cannot be used, more than {max_bad:.1%}: {first}. "
            "List them all with: sana-sprint data check"
        )


def _open_records(path: Path) -> Records:
    if path.is_dir():
        return _open_folder(path)
    kind = path.suffix.lower()
    if not path.is_file() or kind not in (".jsonl", ".csv", ".parquet", ".tar"):
        raise ValueError(
            f"data source {str(path)!r} is neither a folder nor a .jsonl, .csv, .parquet or .tar file, "
            "nor module:function"
        )
    if kind == ".tar":
        return TarRecords([path])
    return ParquetRecords([path]) if kind == ".parquet" else TableRecords(path)


def _open_folder(folder: Path) -> Records:
    shards = {suffix: sorted(folder.glob(f"*{suffix}")) for suffix in (".tar", ".parquet")}
    tables = [folder / name for name in _TABLES if (folder / name).is_file()]
    kinds = [*(paths[0].name for paths in shards.values() if paths), *(table.name for table in tables)]
    if len(kinds) > 1:
        raise ValueError(
            f"{folder} holds sets of several kinds, such as {' and '.join(kinds)}: name one file"
        )
    if shards[".tar"]:
        return TarRecords(shards[".tar"])
    if shards[".parquet"]:
        return ParquetRecords(shards[".parquet"])
    return TableRecords(tables[0]) if tables else FolderRecords(folder)
