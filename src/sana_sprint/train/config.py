"""What a training run is: one TOML file, checked before anything starts.

Unknown fields are errors. `load_config("stage.toml", ["schedule.steps=100"])` applies dotted overrides, whose
values are TOML too.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(_Section):
    """Where samples come from.

    `source` is either a folder of pictures with a caption file `<name>.txt` beside each, or
    "module:function", a function from a sample's index to a uint8 (H,W,3) array, or to (array, caption).
    """

    source: str
    # Pictures whose latents are cached once and then trained on (teacher and student).
    num_samples: int = Field(default=20_000, ge=1)
    # Captions are dropped with this probability, so that guidance has an unconditional model.
    caption_dropout: float = Field(default=0.1, ge=0, le=1)


class OptimizerConfig(_Section):
    """AdamW, or Muon for matrices with AdamW for everything else."""

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = Field(default=1e-3, gt=0)
    # Muon's own rate, in units of an RMS-1 update of each matrix.
    matrix_learning_rate: float = Field(default=0.02, gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    warmup_steps: int = Field(default=100, ge=0)
    # The last part of the run decays the rate linearly to zero: 0.5 = second half, 0 = never.
    decay_fraction: float = Field(default=0.3, ge=0, le=1)
    ema_decay: float = Field(default=0.999, ge=0, lt=1)


class ScheduleConfig(_Section):
    """How long, how much at a time, and how often to report and save (in steps)."""

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    # Parts that a process computes one after the other for a step, so that a large batch fits into memory.
    accumulation: int = Field(default=1, ge=1)
    log_every: int = Field(default=20, ge=1)
    sample_every: int = Field(default=500, ge=1)
    save_every: int = Field(default=500, ge=1)


class _Run(_Section):
    output: Path
    seed: int = 0
    # bf16 = autocast over fp32 weights.
    precision: Literal["fp32", "bf16"] = "bf16"
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig

    @property
    def optimizers(self) -> tuple[OptimizerConfig, ...]:
        """One for each of the stage's players, in order."""
        return (self.optimizer,)


class AutoencoderRun(_Run):
    """Trains a DC-AE from scratch on pictures."""

    stage: Literal["autoencoder"]
    model: dict[str, Any]
    # Standard deviation of noise added to latents before decoding: smooths the latent space for the diffusion model.
    latent_noise: float = Field(default=0.1, ge=0)
    # Weight of the mean squared latent, which keeps the encoder from shouting that noise down.
    latent_weight: float = Field(default=1e-3, ge=0)


class TeacherRun(_Run):
    """Trains a flow-matching teacher, with its text encoder, on cached latents."""

    stage: Literal["teacher"]
    autoencoder: Path
    tokenizer_vocab: int = Field(default=1024, ge=300)
    text_encoder: dict[str, Any]
    model: dict[str, Any]
    # Flow times are sigmoid(N(mean, std)): logit-normal, as SD3 and SANA.
    time_mean: float = 0.0
    time_std: float = Field(default=1.0, gt=0)
    # Part of the steps whose prompts carry the complex human instruction, so that both ways of prompting work.
    instruction_rate: float = Field(default=0.5, ge=0, le=1)
    # Guidance of the sample grids.
    guidance_scale: float = Field(default=4.5, ge=1)


class StudentRun(_Run):
    """Distils a teacher run into a continuous-time consistency student (sCM)."""

    stage: Literal["student"]
    teacher: Path
    # Guidance scales the student learns, drawn uniformly; it is told which.
    guidance_scales: tuple[float, ...] = (4.0, 4.5, 5.0)
    tangent_warmup_steps: int = Field(default=100, ge=0)
    time_mean: float = 0.2
    time_std: float = Field(default=1.6, gt=0)
    instruction_rate: float = Field(default=0.5, ge=0, le=1)


RunConfig = Annotated[AutoencoderRun | TeacherRun | StudentRun, Field(discriminator="stage")]
AnyRun = AutoencoderRun | TeacherRun | StudentRun


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> AnyRun:
    """Reads and checks a stage's TOML file.

    Args:
        path: the file.
        overrides: "dotted.key=value" each; the value is read as TOML, or as a bare string if that fails.

    Raises:
        ValueError: the file or an override cannot be read, or a field is unknown, missing or out of range;
            the message lists every problem.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the stage file {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    for override in overrides:
        _apply(values, override)
    try:
        return TypeAdapter[AnyRun](RunConfig).validate_python(values)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"{path}: {problems}") from error


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"an override is KEY=VALUE, such as schedule.steps=100; got {override!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ValueError(f"override {override!r}: {parent!r} is a value, not a section")
    values[last] = value
