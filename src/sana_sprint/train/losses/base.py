"""The interface of a loss of the distillation. `losses/__init__.py` lists all losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Self

from torch import Tensor, nn

from sana_sprint.train.metrics import Metrics
from sana_sprint.train.sections import Section

if TYPE_CHECKING:
    from sana_sprint.train.distillation import Batch, Distillation


class Loss:
    """One loss of the student and, if it needs one, the module that is trained against or beside the student.

    A subclass is one file: its section of the stage file, its modules and its two functions.
    """

    # The loss's table in a stage file, or None if its settings are fields of the run itself. A section with an `optimizer`
    # belongs to a loss with one player.
    Config: ClassVar[type[Section] | None] = None

    # Modules that this loss trains besides the student, by name. They take turns with the student, a step each.
    players: Mapping[str, nn.Module] = {}

    # Modules without an optimiser that a checkpoint must hold, such as a moving average that is a target.
    kept: Mapping[str, nn.Module] = {}

    # Facts about data that only this loss uses, see `stages.base.Stage.data`.
    facts: Mapping[str, str] = {}

    @classmethod
    def check(cls, sections: Mapping[str, Section]) -> None:
        """Raises a ValueError where a run's sections, by name, lack something that this loss needs."""

    @classmethod
    def make(cls, distillation: Distillation, section: Section | None) -> Self | None:
        """The loss of a run, or None if the run does not use it. `section` is its table in the stage file."""
        raise NotImplementedError

    def student(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The student's loss times its weight, and metrics to log."""
        raise NotImplementedError

    def player(self, name: str, batch: Batch) -> tuple[Tensor, Metrics]:
        """The loss of one of `players` in its turn, and metrics to log."""
        raise NotImplementedError
