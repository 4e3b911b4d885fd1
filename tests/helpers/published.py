"""Runs one snippet with diffusers and with this package; see tests/published/conftest.py for how to add one."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

LIBRARIES = ("diffusers", "sana_sprint")
ATOL = 1e-5  # fp32: both sum the same numbers in other orders
LEVELS = 2  # of 255: a value near the middle of two levels may be rounded either way

Snippet = Callable[[ModuleType, Path], Any]


def run(name: str, snippet: Snippet, folder: Path) -> Any:
    """The snippet's result with the library of this name."""
    torch.manual_seed(0)
    return snippet(importlib.import_module(name), folder)


def same(snippet: Snippet, folder: Path, *, atol: float = ATOL) -> Any:
    """Asserts that both libraries give the same; returns this package's result.

    Results may be tensors, arrays, pictures, numbers, text, None, and lists, tuples and mappings of those; an output object is
    compared by its `images`.
    """
    expected, found = (run(name, snippet, folder) for name in LIBRARIES)
    assert_same(found, expected, atol=atol)
    return found


def both_refuse(
    snippet: Snippet,
    folder: Path,
    *,
    match: str,
    error: type[Exception] | tuple[type[Exception], ...] = Exception,
) -> None:
    """Asserts that both raise. Ours must be a ValueError that matches `match`; theirs may be any `error`."""
    theirs, ours = LIBRARIES
    with pytest.raises(error):
        run(theirs, snippet, folder)
    with pytest.raises(ValueError, match=match):
        run(ours, snippet, folder)


def assert_same(found: Any, expected: Any, *, atol: float = ATOL, at: str = "result") -> None:
    """Equal in structure, type and value; floating-point tensors and arrays to `atol`, pictures to `LEVELS`."""
    if hasattr(expected, "images"):
        found, expected = found.images, expected.images
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, atol=atol, rtol=0, msg=lambda text: f"{at}: {text}")
    elif isinstance(expected, np.ndarray):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype), at
        np.testing.assert_allclose(found, expected, atol=atol, rtol=0, err_msg=at)
    elif isinstance(expected, Image.Image):
        assert (found.size, found.mode) == (expected.size, expected.mode), at
        difference = np.asarray(found, np.int64) - np.asarray(expected, np.int64)
        assert np.abs(difference).max() <= LEVELS, at
    elif isinstance(expected, Mapping):
        assert list(found) == list(expected), at
        for key, value in expected.items():
            assert_same(found[key], value, atol=atol, at=f"{at}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert (type(found), len(found)) == (type(expected), len(expected)), at
        for i, value in enumerate(expected):
            assert_same(found[i], value, atol=atol, at=f"{at}[{i}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=atol), at
    else:
        assert (type(found), found) == (type(expected), expected), at


def quiet(lib: ModuleType, folder: Path, **settings: Any) -> Any:
    """The folder's pipeline, without a progress bar."""
    pipe = lib.SanaSprintPipeline.from_pretrained(folder, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe
