"""Checkpoints: what is kept, what is continued, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from sana_sprint.train import loop
from sana_sprint.train.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from tests.helpers.toy_stage import Toy, assert_same, saved, toy_run, train_toy
from tests.helpers.training import parse, silent


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    train_toy(toy_run(tmp_path, steps=5, **{"schedule.save_every": 1, "schedule.keep_checkpoints": 3}))
    assert names(tmp_path) == [f"checkpoint-{step:08d}.pt" for step in (3, 4, 5)]
    assert not list(tmp_path.glob("*.partial"))


def test_a_write_that_fails_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_toy(toy_run(tmp_path, steps=1))

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(parse(toy_run(tmp_path, steps=2)), 2, {}, {})
    monkeypatch.undo()
    assert names(tmp_path) == ["checkpoint-00000001.pt"]
    train_toy(toy_run(tmp_path, steps=2))
    assert names(tmp_path) == ["checkpoint-00000001.pt", "checkpoint-00000002.pt"]


def test_resume_says_from_where(tmp_path: Path) -> None:
    lines: list[str] = []

    def go(resume: str, folder: str = "run", steps: int = 6) -> None:
        run = parse(toy_run(tmp_path / folder, steps=steps, resume=resume, **{"schedule.save_every": 2}))
        loop.run(Toy(run), run, report=lines.append)

    with pytest.raises(ValueError, match=r'resume is "latest", but .*run holds no checkpoint'):
        go("latest")
    go("never", steps=4)
    assert not [line for line in lines if "resuming" in line]
    with pytest.raises(ValueError, match=r'resume is "never", but .* holds checkpoint-00000004.pt'):
        go("never")
    go("latest")
    assert "resuming at step 4" in lines
    go(str(tmp_path / "run" / "checkpoint-00000004.pt"), folder="branch")
    assert lines.count("resuming at step 4") == 2
    assert_same(tmp_path / "run", tmp_path / "branch")
    with pytest.raises(ValueError, match=r"resume is 'last': neither"):
        go("last")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed is 1 and was 0"),
        ({"schedule.batch_size": 8}, "schedule.batch_size is 8 and was 4"),
        (
            {"optimizer.learning_rate": 0.5, "ema_decay": 0.5},
            "ema_decay is 0.5 and was 0.9; optimizer.learning_rate is 0.5 and was 0.01",
        ),
        ({"optimizer.name": "came"}, "optimizer.name is 'came' and was 'adamw'"),
        ({"players": 1}, r"discriminator.blocks is None and was \[0\]"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    train_toy(toy_run(tmp_path, steps=1))
    with pytest.raises(ValueError, match=message):
        train_toy(toy_run(tmp_path, steps=2, **changes))


def test_a_checkpoint_of_other_data_is_refused(tmp_path: Path) -> None:
    train_toy(toy_run(tmp_path, steps=1))
    run = parse(toy_run(tmp_path, steps=2))
    (path,) = checkpoints(tmp_path)
    with pytest.raises(ValueError, match=r"other data \(vectors: 12, was 10\): restore that, or begin a run"):
        load_checkpoint(path, run, {"vectors": "12"})
    content = torch.load(path, weights_only=True)
    del content["data"]
    torch.save(content, path)
    assert load_checkpoint(path, run, {"vectors": "12"})["step"] == 1  # it does not tell


def test_length_and_reports_may_change(tmp_path: Path) -> None:
    train_toy(toy_run(tmp_path, steps=1))
    changes = {"schedule.log_every": 1, "schedule.save_every": 3, "tensorboard": False, "resume": "latest"}
    train_toy(toy_run(tmp_path, steps=2, **changes))
    assert names(tmp_path)[-1] == "checkpoint-00000002.pt"


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    run = parse(toy_run(tmp_path))
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.pt cannot be read as a checkpoint"):
        load_checkpoint(tmp_path / "text.pt", run, {})
    torch.save({"module": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="is not a checkpoint of this version"):
        load_checkpoint(tmp_path / "other.pt", run, {})


def test_a_finished_run_is_exported_again_and_not_changed(tmp_path: Path) -> None:
    train_toy(toy_run(tmp_path, steps=2))
    before = saved(tmp_path)
    (tmp_path / "final" / "student.pt").unlink()
    train_toy(toy_run(tmp_path, steps=2))
    assert (tmp_path / "final" / "student.pt").is_file()
    assert all(torch.equal(value, before[name]) for name, value in saved(tmp_path).items())


def test_a_sharded_run_alone_is_like_any_other(tmp_path: Path) -> None:
    for name, distribution in (("one", "replicate"), ("two", "shard")):
        run = parse(toy_run(tmp_path / name, steps=3, distribution=distribution))
        loop.run(Toy(run), run, report=silent)
    assert_same(tmp_path / "one", tmp_path / "two")
