"""The interface between the training loop and a stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from sana_sprint.train import distributed
from sana_sprint.train.config import AnyRun
from sana_sprint.train.data.sampler import Part
from sana_sprint.train.metrics import Metrics

Report = Callable[[str], None]  # receives a line about every milestone


class Stage(Protocol):
    """The trained modules, the loss of each part of a step, and the export of the result."""

    @property
    def players(self) -> Mapping[str, nn.Module]:
        """The trained modules by name. The first is averaged, validated and exported with its average."""

    @property
    def kept(self) -> Mapping[str, nn.Module]:
        """Modules without an optimiser that a checkpoint must hold, by name."""

    @property
    def data(self) -> Mapping[str, str]:
        """Facts about the data (mostly hashes) by name. A checkpoint resumes only with equal facts."""

    def player(self, step: int) -> str:
        """The name of the module trained at this step: a function of the step alone, so that skips and resumes do not shift it."""

    def loss(self, part: Part) -> tuple[Tensor, Metrics]:
        """The mean loss of the step's player on this part, and metrics to log."""

    def validate(self, folder: Path, step: int) -> Metrics:
        """Writes sample pictures into the folder and returns measurements; runs with averaged weights."""

    def export(self, folder: Path) -> None:
        """Writes the finished model folder; runs with averaged weights."""


def autocast(config: AnyRun) -> torch.autocast:
    """The run's precision, as a context: bf16 products over fp32 weights, or fp32 throughout."""
    return torch.autocast(distributed.device().type, torch.bfloat16, enabled=config.precision == "bf16")


__all__ = ["Metrics", "Part", "Report", "Stage", "autocast"]
