"""What the loop needs of a stage, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from sana_sprint.train import distributed
from sana_sprint.train.config import AnyRun

Metrics = dict[str, float]
Report = Callable[[str], None]  # receives a line about every milestone


@dataclass(frozen=True)
class Part:
    """One forward and backward pass worth of a step."""

    step: int  # optimisation step, from 0; all players' turns are counted together
    indices: range  # positions in the stream of samples


class Stage(Protocol):
    """What learns, the loss of each part of a step, and how to show and export the result."""

    @property
    def players(self) -> Mapping[str, nn.Module]:
        """What learns, by name. The first is averaged, validated and exported with its average."""

    @property
    def data(self) -> Mapping[str, str]:
        """What it is trained on, hashes mostly, by the names that a message gives them."""

    def player(self, step: int) -> str:
        """Who learns at this step: a function of the step alone, so that neither a skipped step nor a resume shifts it."""

    def loss(self, part: Part) -> tuple[Tensor, Metrics]:
        """The mean loss of the step's player on this part, and what to log."""

    def validate(self, folder: Path, step: int) -> Metrics:
        """Writes sample pictures into the folder and returns measurements; runs with averaged weights."""

    def export(self, folder: Path) -> None:
        """Writes the finished model folder; runs with averaged weights."""


def autocast(config: AnyRun) -> torch.autocast:
    """The run's precision, as a context: bf16 products over fp32 weights, or fp32 throughout."""
    return torch.autocast(distributed.device().type, torch.bfloat16, enabled=config.precision == "bf16")
