"""The configuration of a training run: one TOML file, checked before anything starts.

Unknown fields are errors. `load_config("stage.toml", ["schedule.steps=100"])` applies dotted overrides, whose
values are TOML too.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError, create_model, model_validator

from sana_sprint.sampling import PUBLISHED_GUIDANCE
from sana_sprint.train.losses import LOSSES
from sana_sprint.train.sections import OptimizerConfig, Section

# Fields in which a run may differ from the checkpoint it continues from: its length, its reports, and how the work is
# laid out on the machine.
MAY_CHANGE = frozenset(
    {
        "output",
        "resume",
        "distribution",
        "gradient_checkpointing",
        "tensorboard",
        "recompute_pictures",
        "schedule.steps",
        "schedule.accumulation",
        "schedule.log_every",
        "schedule.sample_every",
        "schedule.save_every",
        "schedule.keep_checkpoints",
    }
)


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


class _Run(Section):
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


class AutoencoderRun(_Run):
    """Trains a DC-AE on pictures, from scratch or from a folder."""

    stage: Literal["autoencoder"]
    data: DataConfig
    # An autoencoder's folder to go on from; without it `model` describes a new one.
    start: Path | None = None
    model: dict[str, Any] | None = None
    # Standard deviation of noise added to latents before decoding: smooths the latent space for the diffusion model.
    latent_noise: float = Field(default=0.1, ge=0)
    # Weight of the mean squared latent: stops the encoder from growing its latents until the noise no longer matters.
    latent_weight: float = Field(default=1e-3, ge=0)

    @model_validator(mode="after")
    def _check_start(self) -> AutoencoderRun:
        if (self.start is None) == (self.model is None):
            raise ValueError("either model or start is needed, and not both")
        return self


class _FlowRun(_Run):
    """Flow matching on cached latents."""

    data: LatentDataConfig
    # Recompute each block's activations in the backward pass instead of keeping them.
    gradient_checkpointing: bool = False
    # Captions are dropped with this probability, so that guidance has an unconditional model.
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    # Flow times are sigmoid(N(mean, std)): logit-normal, as SD3 and SANA.
    time_mean: float = 0.0
    time_std: float = Field(default=1.0, gt=0)
    # Part of the steps whose prompts carry the complex human instruction, so that both ways of prompting work.
    instruction_rate: float = Field(default=0.5, ge=0, le=1)
    # Guidance of the sample grids.
    guidance_scale: float = Field(default=PUBLISHED_GUIDANCE, ge=1)


class TeacherRun(_FlowRun):
    """Trains a flow-matching teacher and its text encoder, from scratch or from a folder."""

    stage: Literal["teacher"]
    autoencoder: Path
    # A folder of `tokenizer`, `text_encoder` and `transformer` to go on from; without it the next three describe new ones.
    start: Path | None = None
    tokenizer_vocab: int = Field(default=1024, ge=300)
    text_encoder: dict[str, Any] | None = None
    model: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_start(self) -> TeacherRun:
        given = sorted({"text_encoder", "model", "tokenizer_vocab"} & self.model_fields_set)
        if self.start is not None and given:
            raise ValueError(f"start has models of its own: leave out {', '.join(given)}")
        if self.start is None and (self.text_encoder is None or self.model is None):
            raise ValueError("text_encoder and model are needed, or start")
        return self


class ControlConfig(Section):
    """A branch that follows a picture, as copies of the transformer's first blocks: see `models/controlnet.py`."""

    # What it follows: a kind of `sana_sprint.controls` that needs no weights ("scribble", "canny", "softedge"), or
    # "module:function", which maps a picture, uint8 (H,W,3), and its position in the set to a picture like it.
    condition: str
    num_copies: int = Field(default=7, ge=1)
    topology: Literal["diffusers", "official"] = "diffusers"


class ControlTeacherRun(_FlowRun):
    """Trains a control branch of a flow-matching teacher, which stays as it is."""

    stage: Literal["control-teacher"]
    # A folder of `transformer`, `text_encoder`, `tokenizer` and `vae`.
    teacher: Path
    # Encode all captions once and keep them on disk, rather than at every visit.
    cache_text: bool = False
    control: ControlConfig


class AdaptationRun(_FlowRun):
    """Fine-tunes a flow-matching teacher that lacks dense time or QK norm until it has both (section 3.2 of the paper)."""

    stage: Literal["adaptation"]
    # A pipeline's folder or Hub id: its transformer learns, its text encoder does not.
    teacher: Path
    # Encode all captions once and keep them on disk, rather than at every visit.
    cache_text: bool = False


class _StudentFields(_Run):
    """Distils a teacher run into a student for few steps. Each loss of `losses.LOSSES` adds its section."""

    stage: Literal["student"]
    # A pipeline folder whose student, or control branch, goes on learning; without it that starts as its teacher.
    start: Path | None = None
    data: LatentDataConfig
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

    @model_validator(mode="after")
    def _has_a_loss(self) -> Self:
        if not self.scm_weight and not self.sections():
            names = [f"[{name}]" for name in _SECTIONS]
            given = f"{', '.join(names[:-1])} or {names[-1]}"
            raise ValueError(f"scm_weight is 0, and there is no {given}: nothing to learn from")
        return self

    @model_validator(mode="after")
    def _losses_fit_together(self) -> Self:
        sections = self.sections()
        for name in sections:
            LOSSES[name].check(sections)
        return self

    def sections(self) -> dict[str, Section]:
        """The losses' sections that this run has, by name, in the order of `losses.LOSSES`."""
        found = {name: getattr(self, name) for name in _SECTIONS}
        return {name: section for name, section in found.items() if section is not None}

    @property
    def optimizers(self) -> tuple[OptimizerConfig, ...]:
        """The student's, and those of the losses that train a module of their own."""
        others = [getattr(section, "optimizer", None) for section in self.sections().values()]
        return (self.optimizer, *(each for each in others if each is not None))


_SECTIONS = {name: loss.Config for name, loss in LOSSES.items() if loss.Config is not None}

if TYPE_CHECKING:

    class StudentRun(_StudentFields):
        """`_StudentFields` with an optional section for each loss."""

else:
    StudentRun = create_model(
        "StudentRun",
        __base__=_StudentFields,
        __module__=__name__,
        __doc__=_StudentFields.__doc__,
        **{name: (section | None, None) for name, section in _SECTIONS.items()},
    )


class ControlStudentRun(StudentRun):
    """Distils a teacher with a control branch into a branch for a student, which stays as it is."""

    stage: Literal["control-student"]  # type: ignore[assignment]  # a variant of the parent's
    # The pipeline folder that is to be controlled.
    student: Path
    # The folder of the control-teacher run's `controlnet`, from which the student's branch starts.
    controlnet: Path
    condition: str


AnyRun = AutoencoderRun | TeacherRun | AdaptationRun | ControlTeacherRun | StudentRun | ControlStudentRun
RunConfig = Annotated[AnyRun, Field(discriminator="stage")]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> AnyRun:
    """Reads and checks a stage's TOML file, or the `config.json` that a run has saved.

    Args:
        path: the file.
        overrides: "dotted.key=value" each; the value is read as TOML, or as a bare string if that fails.

    Raises:
        ValueError: the file or an override cannot be read, or a field is unknown, missing or out of range;
            the message lists every problem.
    """
    path = Path(path)
    try:
        read = json.loads if path.suffix == ".json" else tomllib.loads
        values = read(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the stage file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not valid {'JSON' if path.suffix == '.json' else 'TOML'}: {error}"
        ) from error
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
