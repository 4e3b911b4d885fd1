"""Runs whose scores are kept: what the ablations of students and of teachers share."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

Values = dict[str, Any]
Train = Callable[[Values, Path], object]  # trains these values of a stage file in this folder


def kept(values: Values, train: Train, score: Callable[[Path], Values]) -> Values:
    """A run's scores: from disk, or by training and scoring it, in a folder named after its `output` and its values."""
    base = Path(values["output"])
    # Other values, another folder: a changed recipe must not meet old scores.
    folder = base.with_name(f"{base.name}-{zlib.crc32(to_toml(values).encode()):08x}")
    scores = folder / "scores.json"
    if not scores.is_file():
        train({**values, "output": str(folder)}, folder)
        scores.write_text(json.dumps(score(folder)), encoding="utf-8")
    found: Values = json.loads(scores.read_text(encoding="utf-8"))
    return found


def letters(name: str) -> str:
    """A name that a folder can have."""
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def to_toml(values: Values, prefix: str = "") -> str:
    """Nested values as TOML; JSON writes strings, numbers, booleans and lists of them the same way."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict)]
    for key, value in values.items():
        if isinstance(value, dict):
            lines += ["", f"[{prefix}{key}]", to_toml(value, f"{prefix}{key}.")]
    return "\n".join(lines)


def log_of(folder: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of what a run's log says by this name."""
    entries = map(json.loads, (folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [(entry["step"], entry[name]) for entry in entries if name in entry]
