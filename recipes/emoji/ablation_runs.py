"""Runs whose scores are kept, several at a time: what the ablations of students and of teachers share."""

from __future__ import annotations

import json
import multiprocessing
import signal
import subprocess
import sys
import traceback
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

Values = dict[str, Any]
Train = Callable[[Values, Path], object]  # trains these values of a stage file in this folder
Task = TypeVar("Task")
Result = TypeVar("Result")


class Run(NamedTuple):
    """A variant's name, and a seed."""

    name: str
    seed: int

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"


def run_all(tasks: Iterable[Task], parallel: int, function: Callable[[Task], Result]) -> dict[Task, Result]:
    """The function's result for each task, so many at a time, each in a process of its own.

    Raises:
        RuntimeError: some failed, which it names; all others were done before.
    """
    results: dict[Task, Result] = {}
    failed: list[str] = []
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(parallel, mp_context=context, initializer=_end_at_interrupt) as pool:
        futures = {pool.submit(function, task): task for task in tasks}
        for future in as_completed(futures):
            try:
                results[futures[future]] = future.result()
            except Exception as error:
                traceback.print_exception(error)
                failed.append(f"{futures[future]} ({error})")
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(futures)} failed: {'; '.join(failed)}")
    return results


def _end_at_interrupt() -> None:
    """A pool takes KeyboardInterrupt for one task's failure, and goes on to the next."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def train(values: Values, folder: Path, *, processes: int, is_logged: bool) -> None:
    """Trains in other processes, from where a stopped run was; `is_logged` sends what they say to the folder's train.log.

    Raises:
        RuntimeError: they failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stage, log = folder / "stage.toml", folder / "train.log"
    stage.write_text(to_toml(values), encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    # Alone, without a rendezvous: many of them at once meet each other's ports.
    command = [sys.executable, *(launch if processes > 1 else []), "-m", "sana_sprint", "train", str(stage)]
    with log.open("ab") if is_logged else nullcontext() as output:
        code = subprocess.run(command, stdout=output, stderr=output, check=False).returncode
    if code:
        raise RuntimeError(f"training ended with code {code}: {log if is_logged else stage}")


def kept(values: Values, train: Train, score: Callable[[Path], Values]) -> Values:
    """A run's scores: from disk, or by training and scoring it, in its `folder_of`."""
    folder = folder_of(values)
    scores = folder / "scores.json"
    if not scores.is_file():
        train({**values, "output": str(folder)}, folder)
        scores.write_text(json.dumps(score(folder)), encoding="utf-8")
    found: Values = json.loads(scores.read_text(encoding="utf-8"))
    return found


def folder_of(values: Values) -> Path:
    """Named after `output` and all values: a changed recipe must not meet old scores."""
    base = Path(values["output"])
    return base.with_name(f"{base.name}-{zlib.crc32(to_toml(values).encode()):08x}")


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
