"""What a run must remember to continue exactly: weights, optimiser, moving average and step.

There is no generator state: every step seeds itself from (seed, step), see `loop.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class EMA:
    """Exponential moving average of a module's parameters, in fp32.

    The decay warms up as (1 + step) / (10 + step), so that early averages forget the initial weights.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: p.detach().clone().float() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Moves the average towards the module's weights after optimiser step `step` (from 0)."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.weights.values()), [p.detach() for p in module.parameters()], weight)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrites the module's parameters with the average."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.weights[name])

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Takes up the weights of an average that was saved."""
        for name, weight in self.weights.items():
            weight.copy_(weights[name])

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchanges the module's parameters and the average; twice is the identity."""
        for name, parameter in module.named_parameters():
            live = parameter.detach().clone()
            parameter.copy_(self.weights[name])
            self.weights[name].copy_(live)


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Writes `checkpoint-<step>.pt` atomically and deletes older ones; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"checkpoint-{step:08d}.pt"
    partial = path.with_suffix(".partial")
    torch.save({"step": step, **state}, partial)
    os.replace(partial, path)
    for old in sorted(folder.glob("checkpoint-*.pt"))[:-1]:
        old.unlink()
    return path


def load_latest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint's content, or None where the folder has none."""
    found = sorted(folder.glob("checkpoint-*.pt"))
    if not found:
        return None
    content: dict[str, Any] = torch.load(found[-1], map_location="cpu", weights_only=True)
    return content
