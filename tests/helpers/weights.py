"""A model with one of everything that a folder can hold, for the tests of reading and writing folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WHOLE = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    width: int = 6
    sizes: tuple[int, ...] = (2, 3)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TinyConfig:
        kept = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if not k.startswith("_")}
        if unknown := kept.keys() - {field.name for field in fields(cls)}:
            raise ValueError(f"unknown fields: {sorted(unknown)}")
        return cls(**kept)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Tiny(nn.Module):
    """One of each thing a model can hold: weights, a drawn table, buffers."""

    config_class = TinyConfig
    published_class_name = "TinyPublished"

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        if config.width < 2:
            raise ValueError(f"width must be at least 2, got: {config.width}")
        self.config = config
        self.linear = nn.Linear(config.width, 4)
        self.conv = nn.Conv2d(4, 3, 3)
        self.norm = nn.BatchNorm2d(4)  # has an integer buffer without dimensions
        self.table = nn.Parameter(torch.randn(2, config.width) / config.width**0.5)
        self.made_on = {key: parameter.device.type for key, parameter in self.named_parameters()}


def tiny_model() -> Tiny:
    """A `Tiny` whose buffers differ from those of a new one, in training mode. Its tensors take 676 bytes."""
    model = Tiny(TinyConfig())
    model.norm.running_mean.normal_()
    model.norm.num_batches_tracked.fill_(11)
    return model


def assert_same(loaded: nn.Module, expected: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Bitwise equal state, after the one rounding to `dtype`; weights are only moved, so nothing less will do."""
    loaded, expected = loaded.state_dict(), expected.state_dict()
    assert list(loaded) == list(expected)
    for key, value in expected.items():
        wanted = value.to(dtype) if dtype and value.is_floating_point() else value
        assert loaded[key].dtype == wanted.dtype, key
        assert torch.equal(loaded[key], wanted), key


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Replace a safetensors file's tensors by `change` of them."""
    tensors = load_file(path)
    change(tensors)
    path.unlink()  # `tensors` may be views of the old file
    save_file(tensors, path)


def edit_json(path: Path, **changes: Any) -> None:
    """Replace fields of the object in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
