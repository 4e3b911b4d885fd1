"""The stages on pictures of many sizes, one of them broken: from files to a step of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from tests.helpers.data import png, write_folder
from tests.helpers.training import autoencoder_run, student_run, teacher_run, train

SHAPES = [(20, 20), (40, 20), (16, 32)]


def test_every_stage_trains_on_buckets(tmp_path: Path) -> None:
    pictures = [png(i, SHAPES[i % 3]) for i in range(11)] + [b"broken"]
    folder = write_folder(tmp_path / "set", pictures, [[f"picture {i}", "noise"] for i in range(12)])

    def with_folder(run: dict[str, Any]) -> dict[str, Any]:
        return {**run, "data": {**run["data"], "source": str(folder), "size": 16, "max_bad_fraction": 0.1}}

    train(with_folder(autoencoder_run(tmp_path / "autoencoder", steps=1)))
    train(with_folder(teacher_run(tmp_path / "teacher", tmp_path / "autoencoder" / "final", steps=6)))
    train(with_folder(student_run(tmp_path / "student", tmp_path / "teacher" / "final", steps=2)))
    for stage, last in (("autoencoder", 1), ("teacher", 6), ("student", 2)):
        entries = [json.loads(line) for line in (tmp_path / stage / "log.jsonl").read_text().splitlines()]
        assert max(entry["step"] for entry in entries if "loss" in entry) == last
    # Teacher and student share one cache.
    (file,) = (tmp_path / "latents").iterdir()
    with safe_open(file, "pt") as latents:
        assert {name: latents.get_slice(name).get_shape() for name in latents.keys()} == {  # noqa: SIM118
            "16x16": [4, 4, 4, 4],
            "12x24": [4, 4, 3, 6],
            "24x12": [3, 4, 6, 3],
        }
