"""`sana-sprint data prune` deletes what no kept run reads, and nothing else."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from sana_sprint.train.losses import TrajectoryRegression
from tests.helpers.cli import assert_refused, call, succeed
from tests.helpers.training import (
    autoencoder_run,
    chain,
    control_student_run,
    control_teacher_run,
    loss_of,
    make,
    parse,
    student_run,
    teacher_run,
    trajectories_run,
)

UNUSED, UNFINISHED, YOUNG = "0" * 32 + ".safetensors", "a" * 32 + ".partial-12", "b" * 32 + ".partial-13"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Caches of a teacher, a student with cached text, and a control branch; beside them what a folder collects."""
    made = chain()
    runs = {
        "autoencoder": autoencoder_run(tmp_path / "autoencoder"),
        "teacher": teacher_run(tmp_path / "teacher", made / "autoencoder" / "final"),
        "student": {**student_run(tmp_path / "student", made / "teacher" / "final"), "cache_text": True},
        "control": control_teacher_run(tmp_path / "control", made),
    }
    for name, values in runs.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    for name in ("student", "control"):  # the student has the teacher's latents
        make(parse(runs[name]))
    for kind in ("latents", "embeddings"):
        for name in (UNUSED, UNFINISHED, YOUNG, "notes.txt", "mine.safetensors"):
            (tmp_path / kind / name).write_bytes(bytes(2_000_000))
        old = time.time() - 100_000
        os.utime(tmp_path / kind / UNFINISHED, (old, old))
    return tmp_path


def keeping(folder: Path, *names: str) -> list[object]:
    return [folder, *(each for name in names for each in ("--keep", folder / f"{name}.json"))]


def files(folder: Path) -> set[str]:
    return {f"{kind}/{path.name}" for kind in ("latents", "embeddings") for path in (folder / kind).iterdir()}


def test_what_kept_runs_read_stays(folder: Path) -> None:
    before = files(folder)
    told = succeed("data", "prune", *keeping(folder, "autoencoder", "student", "control"), "--dry-run")
    assert files(folder) == before
    expected = {f"{kind}/{name}" for kind in ("latents", "embeddings") for name in (UNUSED, UNFINISHED)}
    assert {line.partition(f"{folder}/")[2] for line in told.splitlines()[:-1]} == expected
    assert told.splitlines()[-1] == "      8.00 MB  in 4 files would be deleted"

    told = succeed("data", "prune", *keeping(folder, "autoencoder", "student", "control"))
    assert told.splitlines()[-1] == "      8.00 MB  in 4 files deleted"
    assert before - files(folder) == expected

    # A latents' file of the conditions, and the two of the text with and without instruction.
    assert (
        succeed("data", "prune", *keeping(folder, "teacher")).splitlines()[-1].endswith("in 3 files deleted")
    )
    # Of the captions nothing is known any more once their latents are gone.
    (latents,) = (folder / "latents").glob("[0-9a-f]*.safetensors")
    latents.unlink()
    assert_refused(
        call("data", "prune", *keeping(folder, "student")), 1, "not all there", "nothing was deleted"
    )


def test_wrong_calls_are_refused(folder: Path, tmp_path: Path) -> None:
    before = files(folder)
    assert_refused(call("data", "prune", folder), 2, "--keep")
    assert_refused(
        call("data", "prune", folder / "latents", "--keep", folder / "teacher.json"), 1, "no caches"
    )
    assert_refused(call("data", "prune", *keeping(folder, "absent")), 2, "absent.json")
    elsewhere = json.loads((folder / "teacher.json").read_text()) | {"output": "/elsewhere/teacher"}
    (folder / "elsewhere.json").write_text(json.dumps(elsewhere))
    assert_refused(call("data", "prune", *keeping(folder, "elsewhere")), 1, "has its caches in /elsewhere")
    assert files(folder) == before


def test_trajectories_stay_with_the_runs_that_read_them(tmp_path: Path) -> None:
    made = chain()
    runs = {
        "plain": trajectories_run(tmp_path / "plain", made / "teacher" / "final"),
        "steered": control_student_run(tmp_path / "steered", made),
    }
    for name, values in runs.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
        make(parse(values))
    before = set((tmp_path / "trajectories").iterdir())
    assert len(before) == 2  # one for each run
    succeed("data", "prune", *keeping(tmp_path, "plain", "steered"))
    assert set((tmp_path / "trajectories").iterdir()) == before
    succeed("data", "prune", *keeping(tmp_path, "steered"))
    (left,) = (tmp_path / "trajectories").iterdir()
    assert loss_of(make(parse(runs["steered"])), TrajectoryRegression).trajectories
    assert set((tmp_path / "trajectories").iterdir()) == {left}
