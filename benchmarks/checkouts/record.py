"""The registry of items, and the outputs that each of them notes: hashes for comparing, tensors for the error."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import runpy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Item = Callable[["Record"], None]
ITEMS: dict[str, Item] = {}
# Differ from run to run: times, and the numbers of the process that was measured.
VOLATILE = re.compile(r"seconds|timings|_per_s$|_s$")


def item(name: str, *arguments: Any) -> Callable[[Any], Any]:
    """Registers a function `(record, *arguments)` as an item; may be repeated with other arguments."""

    def register(function: Any) -> Any:
        ITEMS[name] = lambda record: function(record, *arguments)
        return function

    return register


class Record:
    """Outputs of one item by name. Tensors, arrays, pictures and files are hashed; all else is kept as JSON."""

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        self.tensors: dict[str, Tensor] = {}

    def note(self, name: str, value: Any) -> None:
        """Adds an output. Raises ValueError for a tensor that is not finite: equal NaNs would prove nothing."""
        if isinstance(value, Path):
            self._note_file(name, value)
        elif isinstance(value, Image.Image):
            self.note(f"{name}.mode", value.mode)
            self.note(name, np.array(value))
        elif isinstance(value, np.ndarray):
            self.note(name, torch.from_numpy(np.ascontiguousarray(value)))
        elif isinstance(value, Tensor):
            self._note_tensor(name, value)
        elif isinstance(value, list | tuple) and any(isinstance(v, Tensor | Image.Image) for v in value):
            for i, each in enumerate(value):
                self.note(f"{name}[{i}]", each)
        elif isinstance(value, Mapping) and any(isinstance(v, Tensor | Path) for v in value.values()):
            for key, each in value.items():
                self.note(f"{name}/{key}", each)
        else:
            self.entries[name] = {"value": json.loads(json.dumps(steady(value), default=str))}

    def note_folder(self, name: str, folder: Path) -> None:
        """Every file of a folder, at any depth."""
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.note(f"{name}/{path.relative_to(folder)}", path)

    def _note_tensor(self, name: str, value: Tensor) -> None:
        value = value.detach().cpu().contiguous().clone()
        if value.is_floating_point() and not value.float().isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity")
        data = value.reshape(-1).view(torch.uint8).numpy().tobytes()
        self.entries[name] = {
            "tensor": hashlib.sha256(data).hexdigest(),
            "shape": list(value.shape),
            "dtype": str(value.dtype),
        }
        self.tensors[name] = value

    def _note_file(self, name: str, path: Path) -> None:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as reader:
                self.note(f"{name}.metadata", reader.metadata())
                for key in reader.keys():  # noqa: SIM118  (not a mapping)
                    self.note(f"{name}/{key}", reader.get_tensor(key))
        elif path.suffix == ".png":
            with Image.open(path) as picture:
                self.note(f"{name}.text", getattr(picture, "text", {}))
                self.note(name, picture.copy())
        elif path.suffix == ".json":
            self.note(name, json.loads(path.read_text(encoding="utf-8")))
        elif path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").splitlines()
            self.note(name, [json.loads(line) for line in lines])
        else:
            self.note(name, hashlib.sha256(path.read_bytes()).hexdigest())

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "entries.json").write_text(json.dumps(self.entries), encoding="utf-8")
        save_file(self.tensors, folder / "tensors.safetensors")


def steady(value: Any) -> Any:
    """A JSON value without what no two runs have in common: times, and the checkout's place."""
    if isinstance(value, Mapping):
        return {str(key): steady(each) for key, each in value.items() if not VOLATILE.search(str(key))}
    if isinstance(value, list | tuple):
        return [steady(each) for each in value]
    return value.replace(os.environ["CHECKOUT"], "CHECKOUT") if isinstance(value, str) else value


def command(*words: object) -> tuple[int, str]:
    """`python -m sana_sprint WORDS` in this process: the exit code and what it printed on stdout."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["sana-sprint", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_module("sana_sprint", run_name="__main__")
        code: Any = 0
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        sys.argv = before
    if code:
        print(err.getvalue(), file=sys.stderr)
    return int(code), out.getvalue()


def succeed(*words: object) -> str:
    """Returns the output of `command`; RuntimeError if it fails."""
    code, out = command(*words)
    if code:
        raise RuntimeError(f"sana-sprint {' '.join(map(str, words))} ended with {code}")
    return out
