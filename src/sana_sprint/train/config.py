"""The configuration of a training run: one TOML file, checked before anything starts.

Unknown fields are errors. `load_config("stage.toml", ["schedule.steps=100"])` applies dotted overrides, whose
values are TOML too.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError, create_model, model_validator

from sana_sprint.sampling import PUBLISHED_GUIDANCE
from sana_sprint.train.losses import LOSSES
from sana_sprint.train.sections import DataConfig, DistillationRun, LatentRun, OptimizerConfig, Run, Section

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


class AutoencoderRun(Run):
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


class _FlowRun(LatentRun):
    """Flow matching on cached latents."""

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


class _StudentFields(DistillationRun):
    """Distils a teacher run into a student for few steps. Each loss of `losses.LOSSES` adds its section."""

    stage: Literal["student"]

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
