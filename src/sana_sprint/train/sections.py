"""Sections that several stages and losses share in a stage's TOML file."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A table of a stage's file: unknown fields are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class OptimizerConfig(Section):
    """The optimiser of one module and its schedule, see `optim.optimizers.make_optimizers`."""

    name: Literal["adamw", "adamw8bit", "came", "muon"] = "adamw"
    learning_rate: float = Field(default=1e-3, gt=0)
    # Muon's own rate, in units of an RMS-1 update of each matrix.
    matrix_learning_rate: float = Field(default=0.02, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    # CAME's third average: of how far updates are from their average.
    confidence_beta: Beta = 0.9999
    # Shrinks matrices and kernels at each step by this times the rate; vectors (biases, norms) never.
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    warmup_steps: int = Field(default=100, ge=0)
    # The last part of the run takes the rate to zero: 0.5 = second half, 0 = never (a constant rate).
    decay: Literal["linear", "cosine"] = "linear"
    decay_fraction: float = Field(default=0.3, ge=0, le=1)
