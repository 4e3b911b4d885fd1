"""Parquet: a row for each picture, as bytes or as a path, with its captions; one file or several."""

from __future__ import annotations

import bisect
import functools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sana_sprint.train.data.readers.base import (
    PICTURE_COLUMNS,
    Record,
    Unreadable,
    captions_of,
    is_caption_column,
    picture_column,
)

_GROUPS_KEPT = (
    4  # row groups in memory: reading in order needs one, threads that read ahead need the next too
)


class _Group(NamedTuple):
    """A row group: its first record's index, its file, its number and its first row there."""

    start: int
    path: Path
    number: int
    row: int


class ParquetRecords:
    """See `records.Records`.

    A parquet file is read by row groups: reading in order reads each once, reading at random reads a group for
    nearly every picture. Pictures are bytes, {"bytes", "path"} as `datasets` writes them, or paths relative to the
    file's folder.

    Raises:
        ValueError: a file is no parquet, or has no picture column.
        ImportError: pyarrow is missing.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        from pyarrow import ArrowException, parquet

        self._groups: list[_Group] = []
        self._columns: dict[Path, tuple[str, list[str]]] = {}
        self._count = 0
        for path in paths:
            try:
                with parquet.ParquetFile(path) as file:
                    self._columns[path] = _columns(path, file.schema_arrow.names)
                    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            except (ArrowException, OSError) as error:
                raise ValueError(f"cannot read the parquet file {path}: {error}") from error
            first = self._count
            for number, size in enumerate(sizes):
                self._groups.append(_Group(self._count, path, number, self._count - first))
                self._count += size
        if not self._count:
            raise ValueError(f"{paths[0]} has no rows")
        self._read = functools.lru_cache(maxsize=_GROUPS_KEPT)(self._read_group)
        self._lock = threading.Lock()  # so that threads wait for a group instead of each reading it

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        group = self._group(index)
        return f"{group.path}:{group.row + index - group.start}"

    def __getitem__(self, index: int) -> Record:
        from pyarrow import ArrowException

        group = self._group(index)
        column, _ = self._columns[group.path]
        try:
            with self._lock:
                rows = self._read(group)
            row: dict[str, Any] = rows.slice(index - group.start, 1).to_pylist()[0]
        except (ArrowException, OSError) as error:
            raise Unreadable(self.name(index), f"its row group: {error}") from error
        picture = _picture(row.pop(column), group.path.parent)
        if picture is None:
            raise Unreadable(self.name(index), f"column {column!r} has neither bytes nor a path")
        return Record(self.name(index), picture, captions_of(row))

    def _group(self, index: int) -> _Group:
        return self._groups[bisect.bisect_right(self._groups, index, key=lambda group: group.start) - 1]

    def _read_group(self, group: _Group) -> Any:
        from pyarrow import parquet

        column, captions = self._columns[group.path]
        with parquet.ParquetFile(group.path) as file:
            return file.read_row_group(group.number, columns=[column, *captions])


def _columns(path: Path, names: list[str]) -> tuple[str, list[str]]:
    column = picture_column(names)
    if column is None:
        raise ValueError(
            f"{path} has no picture column; looked for {', '.join(PICTURE_COLUMNS)} among {', '.join(names)}"
        )
    return column, [name for name in names if is_caption_column(name)]


def _picture(value: Any, folder: Path) -> bytes | None:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        return (folder / value).read_bytes()
    return value if isinstance(value, bytes) and value else None
