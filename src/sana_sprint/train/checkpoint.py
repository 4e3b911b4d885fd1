"""Checkpoints on disk: written whole or not at all, the newest few kept, taken up only by the run they belong to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sana_sprint.train.config import MAY_CHANGE, AnyRun


def save_checkpoint(config: AnyRun, step: int, trainer: Mapping[str, Any], data: Mapping[str, str]) -> Path:
    """Writes `checkpoint-<step>.pt` into the run's folder and deletes all but the newest few; returns its path.

    `data` is what the run has been trained on, as `stage.Stage.data` has it. Neither a crash nor a power cut leaves a half-written checkpoint under that name.
    """
    folder = config.output
    path = folder / f"checkpoint-{step:08d}.pt"
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        content = {
            "step": step,
            "config": config.model_dump(mode="json"),
            "data": dict(data),
            "trainer": trainer,
        }
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _sync_folder(folder)
    for old in checkpoints(folder)[: -config.schedule.keep_checkpoints]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The folder's checkpoints, oldest first."""
    return sorted(folder.glob("checkpoint-*.pt"))


def find_checkpoint(config: AnyRun) -> Path | None:
    """The checkpoint that `config.resume` asks for; None for a new run.

    Raises:
        ValueError: it is not there, or `resume` is "never" and there is one.
    """
    found = checkpoints(config.output)
    if config.resume == "never" and found:
        raise ValueError(
            f'resume is "never", but {config.output} holds {found[-1].name}: give another output, or delete it'
        )
    if config.resume in ("auto", "never"):
        return found[-1] if found else None
    if config.resume == "latest":
        if not found:
            raise ValueError(f'resume is "latest", but {config.output} holds no checkpoint')
        return found[-1]
    path = Path(config.resume)
    if not path.is_file():
        raise ValueError(
            f'resume is {config.resume!r}: neither "auto", "latest", "never" nor a checkpoint\'s file'
        )
    return path


def load_checkpoint(path: Path, config: AnyRun, data: Mapping[str, str]) -> dict[str, Any]:
    """A checkpoint's content: "step" and "trainer". One without facts about its data is accepted.

    Raises:
        ValueError: it is not a checkpoint of this program's, or that of a run with another config or other data; the
            message names what differs.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a file that is something else breaks the unpickler in any way
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
    if isinstance(content, dict) and "learner" in content:  # an older name
        content["trainer"] = content.pop("learner")
    if not isinstance(content, dict) or content.keys() | {"data"} != {
        "step",
        "config",
        "data",
        "trainer",
    }:
        raise ValueError(f"{path} is not a checkpoint of this version")
    then, now = _flat(content["config"]), _flat(config.model_dump(mode="json"))
    differing = [
        f"{name} is {now.get(name)!r} and was {then.get(name)!r}"
        for name in sorted(then.keys() | now.keys())
        if name not in MAY_CHANGE and then.get(name) != now.get(name)
    ]
    if differing:
        raise ValueError(f"{path} belongs to another run: {'; '.join(differing)}")
    _check_data(path, content.get("data", data), data)
    return content


def _check_data(path: Path, then: Mapping[str, str], now: Mapping[str, str]) -> None:
    changed = [f"{name}: {now.get(name)}, was {was}" for name, was in then.items() if now.get(name) != was]
    if changed:
        raise ValueError(
            f"{path} was trained on other data ({'; '.join(changed)}): restore that, or begin a run with another output"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _sync_folder(folder: Path) -> None:
    """Makes a renamed file's new name last: on POSIX that is a property of the folder."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
