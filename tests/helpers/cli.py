"""Calling the command line from tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sana_sprint.cli import app
from tests.helpers.pipeline import tiny_pipeline

SRC = Path(__file__).resolve().parents[2] / "src"


def call(*arguments: object, **settings: Any) -> Any:
    """The result of `sana-sprint ARGUMENTS`, run in this process; settings are CliRunner's, such as `input`."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **settings)


def succeed(*arguments: object, **settings: Any) -> str:
    """Returns the stdout of a call that must succeed."""
    result = call(*arguments, **settings)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def assert_refused(result: Any, exit_code: int, *words: str) -> None:
    """It failed with this code, said `error: ...` with these words and `hint: ...` on stderr, and nothing on stdout."""
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    error, hint = result.stderr.splitlines()
    assert error.startswith("error: "), result.stderr
    assert hint.startswith("hint: "), result.stderr
    for word in words:
        assert word in result.stderr


def save_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model folder with random weights, native size 32 px."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


def subprocess_settings() -> dict[str, str]:
    """The environment for a Python process that shall find the package."""
    return {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
