"""JSONL and CSV: a row for each picture, with its path and its captions."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_sprint.train.data.readers.base import (
    PICTURE_COLUMNS,
    Record,
    Unreadable,
    captions_of,
    picture_column,
)


@dataclass(frozen=True)
class _Row:
    line: int
    picture: Path | None
    captions: tuple[str, ...]
    problem: str = ""


class TableRecords:
    """See `records.Records`. Paths are relative to the table's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        read = _json_lines if path.suffix.lower() == ".jsonl" else _csv_lines
        try:
            self.rows = list(read(path))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"cannot read the table {path}: {error}") from error
        if not self.rows:
            raise ValueError(f"{path} has no rows")

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        row = self.rows[index]
        return f"{self.path}:{row.line}" + (f" ({row.picture.name})" if row.picture else "")

    def __getitem__(self, index: int) -> Record:
        row = self.rows[index]
        if row.picture is None:
            raise Unreadable(self.name(index), row.problem)
        return Record(self.name(index), row.picture.read_bytes(), row.captions)


def _json_lines(path: Path) -> Iterator[_Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                yield _Row(number, None, (), f"not JSON: {error}")
                continue
            if isinstance(row, dict):
                yield _row(path, number, row)
            else:
                yield _Row(number, None, (), "not a JSON object")


def _csv_lines(path: Path) -> Iterator[_Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            # Cells beyond the header's are under the key None.
            yield _row(path, reader.line_num, {key: value for key, value in row.items() if key is not None})


def _row(path: Path, line: int, row: Mapping[str, Any]) -> _Row:
    picture = row.get(picture_column(list(row)) or "")
    if not isinstance(picture, str) or not picture:
        return _Row(line, None, (), f"no picture's path; looked for {', '.join(PICTURE_COLUMNS)}")
    return _Row(line, path.parent / picture, captions_of(row))
