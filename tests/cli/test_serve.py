"""`sana-sprint serve`: what it starts, and what it refuses to start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image
from typer.testing import CliRunner

from sana_sprint.cli import app
from sana_sprint.cli.loading import ModelOptions
from sana_sprint.cli.serve import load_pipelines, serving_name
from sana_sprint.models.controlnet import SanaControlNetModel
from sana_sprint.serve.engine import Engine, ImageRequest
from sana_sprint.weights import save_model
from tests.helpers.serve import assert_close, emoji, result_of, running_engine


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["serve", *arguments])


def test_a_public_address_without_a_key_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SANA_SPRINT_API_KEY", raising=False)
    monkeypatch.setattr(Engine, "__init__", lambda *_, **__: pytest.fail("an engine was made"))
    result = call("--host", "0.0.0.0")
    assert result.exit_code == 2
    error, hint = result.stderr.splitlines()
    assert "needs an API key" in error
    assert "--api-key" in hint


def test_it_serves_the_model_with_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[str, Any] = {}
    engines: list[Engine] = []
    make = Engine.__init__

    def remember(self: Engine, *arguments: Any, **settings: Any) -> None:
        make(self, *arguments, **settings)
        engines.append(self)
        started.update(settings)

    monkeypatch.setattr(Engine, "__init__", remember)
    monkeypatch.setattr(uvicorn, "run", lambda app, **settings: started.update(settings))
    monkeypatch.setenv("SANA_SPRINT_API_KEY", "a-key-for-tests")
    result = call("--host", "0.0.0.0", "--port", "8001", "--max-queue", "3", "--max-batch", "2")
    assert result.exit_code == 0, result.output
    assert "http://0.0.0.0:8001" in result.stderr
    wanted = {"host": "0.0.0.0", "port": 8001, "max_queue": 3, "max_batch": 2, "batch_window_s": 0.005}
    assert {**started, **wanted} == started
    drawn = result_of(engines[0].submit(ImageRequest("a cat", seed=1)))
    assert drawn.images[0].size == (128, 128)
    engines[0].close()


def test_a_controlnet_is_served_with_the_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    branch = SanaControlNetModel.from_transformer(emoji().transformer, num_layers=2)
    for parameter in branch.parameters():  # a new one changes nothing: what it adds is zero
        torch.nn.init.normal_(parameter, std=0.05)
    save_model(branch, tmp_path / "controlnet")
    pipelines = load_pipelines(ModelOptions("emoji", dtype="fp32", device="cpu"), tmp_path)
    sketches = [np.full((64, 64, 3), 255, dtype=np.uint8) for _ in range(3)]
    sketches[0][20:24, 10:50] = 0
    sketches[1][10:50, 30:34] = 0  # the third stays blank, which is no sketch
    with running_engine(lambda: pipelines, batch_window_s=10.0, max_batch=3) as engine:
        jobs = [engine.submit(ImageRequest("a cat", seed=2, image=sketch)) for sketch in sketches]
        found = [result_of(job).images[0] for job in jobs[:2]]
        with pytest.raises(ValueError, match="blank"):
            result_of(jobs[2])
    assert pipelines.control is not None
    for sketch, picture in zip(sketches, found, strict=False):
        call = pipelines.control("a cat", 1, image=Image.fromarray(sketch), kind="scribble", seed=2)
        assert_close(picture, call.images[0])
    assert np.asarray(found[0]).tolist() != np.asarray(found[1]).tolist()


def test_a_folder_is_served_by_its_name(tmp_path: Path) -> None:
    assert serving_name("emoji") == "emoji"
    assert serving_name("owner/model") == "owner/model"
    assert serving_name(str(tmp_path / "..") + f"/{tmp_path.name}/") == tmp_path.name
