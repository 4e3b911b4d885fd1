"""Trains and scores runs in parallel and caches their scores, for the ablations of students and of teachers."""

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
    """Applies the function to each task in processes of its own, `jobs` at a time.

    Raises:
        RuntimeError: names the tasks that failed; all others were finished first.
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
    """Ends the worker on SIGINT: a pool would count KeyboardInterrupt as one failed task and go on to the next."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def train(values: Values, folder: Path, *, processes: int, is_logged: bool) -> None:
    """Trains in other processes and resumes a stopped run; `is_logged` sends their output to the folder's train.log.

    Raises:
        RuntimeError: training failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stage, log = folder / "stage.toml", folder / "train.log"
    stage.write_text(to_toml(values), encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    # A single process needs no rendezvous: many at once would collide on its ports.
    command = [sys.executable, *(launch if processes > 1 else []), "-m", "sana_sprint", "train", str(stage)]
    with log.open("ab") if is_logged else nullcontext() as output:
        code = subprocess.run(command, stdout=output, stderr=output, check=False).returncode
    if code:
        raise RuntimeError(f"training ended with code {code}: {log if is_logged else stage}")


def kept(values: Values, train: Train, score: Callable[[Path], Values]) -> Values:
    """Returns a run's scores, from disk or by training and scoring it in its `folder_of`."""
    folder = folder_of(values)
    scores = folder / "scores.json"
    if not scores.is_file():
        train({**values, "output": str(folder)}, folder)
        scores.write_text(json.dumps(score(folder)), encoding="utf-8")
    found: Values = json.loads(scores.read_text(encoding="utf-8"))
    return found


def folder_of(values: Values) -> Path:
    """Returns the run's folder, named by a hash of all values, so that a changed recipe never reuses old scores."""
    base = Path(values["output"])
    return base.with_name(f"{base.name}-{zlib.crc32(to_toml(values).encode()):08x}")


def letters(name: str) -> str:
    """Returns the name reduced to characters that are valid in a folder's name."""
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def to_toml(values: Values, prefix: str = "") -> str:
    """Nested values as TOML; JSON writes strings, numbers, booleans and lists of them the same way."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict)]
    for key, value in values.items():
        if isinstance(value, dict):
            lines += ["", f"[{prefix}{key}]", to_toml(value, f"{prefix}{key}.")]
    return "\n".join(lines)


def log_of(folder: Path, name: str) -> list[tuple[int, float]]:
    """Returns (step, value) of this metric from a run's log."""
    entries = map(json.loads, (folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [(entry["step"], entry[name]) for entry in entries if name in entry]
