"""Sections and runs that several stages and losses share; `config` has the runs of the stages."""

from __future__ import annotations

import math
from pathlib import Path
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


class DataConfig(Section):
    """The source of samples, see `data.open_source`."""

    source: str
    # Native side in pixels, to which pictures are scaled and cropped: to a square for the autoencoder, else to the nearest
    # aspect bucket. None: they have one size, which fits, already.
    size: int | None = Field(default=None, ge=1)
    # Part of the samples that may be unreadable; more are an error.
    max_bad_fraction: float = Field(default=0.02, ge=0, lt=1)


class LatentDataConfig(DataConfig):
    """Samples whose latents are computed once and then trained on."""

    # Upper limit.
    num_samples: int = Field(default=20_000, ge=1)


class ScheduleConfig(Section):
    """Length, batch size, and the intervals of reports and checkpoints (in steps)."""

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    # Parts that a process computes one after the other for a step, so that a large batch fits into memory.
    accumulation: int = Field(default=1, ge=1)
    log_every: int = Field(default=20, ge=1)
    sample_every: int = Field(default=500, ge=1)
    save_every: int = Field(default=500, ge=1)
    # The newest so many checkpoints stay.
    keep_checkpoints: int = Field(default=2, ge=1)


class Run(Section):
    output: Path
    seed: int = 0
    # From where to continue: "auto" = the newest checkpoint in `output`, if there is one; "latest" = it must be there;
    # "never" = none may be there; or the path of a checkpoint.
    resume: str = "auto"
    # bf16 = autocast over fp32 weights.
    precision: Literal["fp32", "bf16"] = "bf16"
    # With several processes: "shard" divides the optimisers' states and the average over them instead of copying both.
    distribution: Literal["replicate", "shard"] = "replicate"
    # The warmed-up decay of the weights' moving average, which is what validation sees and what is exported.
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    # Log to TensorBoard as well (pip install "sana-sprint[train]").
    tensorboard: bool = False
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig

    @property
    def optimizers(self) -> tuple[OptimizerConfig, ...]:
        """One for each of the stage's players, in order."""
        return (self.optimizer,)


class LatentRun(Run):
    """A run on latents that are computed once."""

    data: LatentDataConfig


class DistillationRun(LatentRun):
    """The fields of a distillation beside the sections of its losses."""

    # A pipeline folder whose student, or control branch, is trained further; without it, it starts as its teacher.
    start: Path | None = None
    # Recompute each block's activations in the backward pass instead of keeping them.
    gradient_checkpointing: bool = False
    teacher: Path
    # Encode all captions once and keep them on disk, rather than at every visit.
    cache_text: bool = False
    # Factor of the consistency loss; 0 leaves it out.
    scm_weight: float = Field(default=1.0, ge=0)
    # Part of the pictures that the student draws in one step for these two losses which start from pure noise (the
    # paper's max-time weighting).
    max_time_rate: float = Field(default=0.5, ge=0, le=1)
    # Recompute the student's blocks for the backward pass of those losses instead of keeping their activations while the
    # consistency loss makes its own.
    recompute_pictures: bool = True
    # Guidance scales the student learns, drawn uniformly; they are an input of the student.
    guidance_scales: tuple[float, ...] = Field(default=(4.0, 4.5, 5.0), min_length=1)
    # How the teacher is guided: see `flow.guided`.
    guidance_projected: bool = False
    guidance_limit: float = Field(default=math.inf, gt=0)
    guidance_from: float = Field(default=0.0, ge=0, lt=1)
    # How dF/dt is computed: see `tangent.make_tangent`.
    tangent: Literal["dual", "jvp", "difference"] = "dual"
    # Steps, of both players, over which the tangent's weight r grows from 0 to 1.
    tangent_warmup_steps: int = Field(default=100, ge=0)
    time_mean: float = 0.2
    time_std: float = Field(default=1.6, gt=0)
    instruction_rate: float = Field(default=0.5, ge=0, le=1)
