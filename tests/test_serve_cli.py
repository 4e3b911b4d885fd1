"""`sana-sprint serve`: what it starts, and what it refuses to start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import uvicorn
from typer.testing import CliRunner

from sana_sprint.cli import app
from sana_sprint.cli.serve import serving_name
from sana_sprint.serve.engine import Engine, ImageRequest
from tests._serve import result_of


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


def test_a_folder_is_served_by_its_name(tmp_path: Path) -> None:
    assert serving_name("emoji") == "emoji"
    assert serving_name("owner/model") == "owner/model"
    assert serving_name(str(tmp_path / "..") + f"/{tmp_path.name}/") == tmp_path.name
