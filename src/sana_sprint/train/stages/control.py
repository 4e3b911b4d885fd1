"""Training control branches: of a flow-matching teacher, then, distilled from it, of a student for few steps.

The two stages of ControlNet with SANA-Sprint (arXiv 2503.09641, section 4.4). In both the transformer stays as it is.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sana_sprint import backends
from sana_sprint.backends.prompt_cache import CachedPromptEncoder
from sana_sprint.images import grid, to_pil
from sana_sprint.models.autoencoder import AutoencoderDC
from sana_sprint.models.controlnet import SanaControlNetModel
from sana_sprint.models.text_encoder import (
    PromptEmbeddings,
    load_text_encoder,
    load_tokenizer,
)
from sana_sprint.models.transformer import CaptionContext, SanaTransformer2DModel
from sana_sprint.train import distributed
from sana_sprint.train.cache.latents import LatentCache, cached_latents
from sana_sprint.train.cache.trajectories import trajectory_settings
from sana_sprint.train.config import ControlStudentRun, ControlTeacherRun, StudentRun
from sana_sprint.train.data import VALIDATION_START, open_source
from sana_sprint.train.data.pictures import fit, to_tensor
from sana_sprint.train.models.base import FlowModel, velocity_of
from sana_sprint.train.models.controlled import ConditionSource, ControlledTransformer
from sana_sprint.train.models.student import with_guidance
from sana_sprint.train.stages.base import Metrics, Report
from sana_sprint.train.stages.captions import frozen_embed
from sana_sprint.train.stages.flow import NUM_VALIDATION_CAPTIONS, FlowStage
from sana_sprint.train.stages.student import StudentStage, TeacherFolder, load_transformer
from sana_sprint.trigflow import Velocity
from sana_sprint.weights import load_model, resolve_folder, save_model


class Conditions:
    """The latents of all samples' conditions, in the order of the samples' own, and those of the validation samples.

    Args:
        config: the run.
        name: of the condition, see `config.ControlConfig`.
        cache: the samples' own latents.
        autoencoder: encodes.
        report: receives lines about the cache.

    Raises:
        ValueError: a condition cannot be made.
    """

    def __init__(
        self,
        config: ControlTeacherRun | ControlStudentRun,
        name: str,
        cache: LatentCache,
        autoencoder: AutoencoderDC,
        *,
        report: Report,
    ) -> None:
        data = config.data
        pictures = open_source(data.source, max_bad=data.max_bad_fraction)
        multiple = autoencoder.spatial_compression_ratio
        source = ConditionSource(pictures, name, size=data.size, multiple=multiple)
        self.cache = cached_latents(
            config.output.parent,
            source,
            data.num_samples,
            autoencoder,
            report=report,
            max_bad=data.max_bad_fraction,
        )
        if len(self.cache) != len(cache):
            raise ValueError(f"{len(cache)} samples have {len(self.cache)} conditions; each must have one")
        self.device = autoencoder.device
        # Of validation's pictures, whatever their own.
        height, width = (multiple * side for side in cache.shape[1:])
        indices = range(VALIDATION_START, VALIDATION_START + NUM_VALIDATION_CAPTIONS)
        shown = [source.condition(fit(pictures(i)[0], height, width), i) for i in indices]
        self.pictures = to_tensor(shown)
        with torch.no_grad():  # one by one: they may be large
            encoded = [autoencoder.encode(each[None].to(self.device)) for each in self.pictures]
        self.validation = torch.cat(encoded) * autoencoder.config.scaling_factor

    def latents(self, indices: Tensor) -> Tensor:
        """(B,C,h,w) of the samples at these places of the cache."""
        return self.cache.latents(indices).to(self.device)

    def show(self, folder: Path, count: int) -> None:
        """Writes the validation samples' conditions into the folder, once."""
        path = folder / "conditions.png"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            grid(to_pil(self.pictures[:count]), columns=8).save(path)


class ControlTeacherStage(FlowStage):
    """Flow matching of the branch alone."""

    def __init__(self, config: ControlTeacherRun, *, report: Report) -> None:
        folder = resolve_folder(str(config.teacher))
        super().__init__(config, folder / "vae", report=report)
        self.conditions = Conditions(
            config, config.control.condition, self.cache, self.autoencoder, report=report
        )
        text_encoder = load_text_encoder(folder / "text_encoder", device=self.device).requires_grad_(False)
        self.encoder = CachedPromptEncoder(load_tokenizer(folder / "tokenizer"), text_encoder)
        self.embed = frozen_embed(config, self.encoder, self.cache.captions, report=report)
        transformer = load_model(
            SanaTransformer2DModel, folder / "transformer", dtype=torch.float32, device=self.device
        )
        self.transformer = backends.apply(transformer).requires_grad_(False)
        controlnet = SanaControlNetModel.from_transformer(
            self.transformer, config.control.num_copies, config.control.topology
        )
        controlnet = backends.apply(controlnet).train()
        self.controlled = ControlledTransformer(self.transformer, controlnet)
        self.controlled.gradient_checkpointing = config.gradient_checkpointing
        self.players = {"teacher": controlnet}

    def context(self, order: Tensor, embeds: Tensor, mask: Tensor) -> CaptionContext:
        """Captions and conditions."""
        return self.controlled.encode(self.conditions.latents(order), embeds, mask)

    def velocity(self, context: CaptionContext) -> Velocity:
        """The steered teacher."""
        return velocity_of(self.controlled, context)

    def validation_contexts(self, embeddings: PromptEmbeddings) -> tuple[CaptionContext, CaptionContext]:
        """Both follow the conditions: guidance is about the caption."""
        latents = self.conditions.validation[: len(embeddings.embeds)]
        return (
            self.controlled.encode(latents, embeddings.embeds, embeddings.mask),
            self.controlled.encode(latents, embeddings.embeds[:, :1]),
        )

    def validate(self, folder: Path, step: int) -> Metrics:
        """As a teacher's, beside the conditions."""
        self.conditions.show(folder, len(self.validation_captions))
        return super().validate(folder, step)

    def export(self, folder: Path) -> None:
        """Writes `controlnet/`."""
        save_model(self.controlled.controlnet, folder / "controlnet")


class ControlledModels:
    """A teacher and a student, both with a control branch. Only the student's branch is trained.

    It starts as the teacher's branch, or as that of `start`.
    """

    def __init__(self, config: StudentRun, source: TeacherFolder, report: Report) -> None:
        assert isinstance(config, ControlStudentRun)
        self.config, self.source = config, source
        self.conditions = Conditions(
            config, config.condition, source.cache, source.autoencoder, report=report
        )
        teacher = load_transformer(source.folder)
        self.student_folder = resolve_folder(str(config.student))
        student = load_transformer(self.student_folder)
        start = config.start and resolve_folder(str(config.start)) / "controlnet"
        branches = [
            backends.apply(
                load_model(SanaControlNetModel, folder, dtype=torch.float32, device=distributed.device())
            )
            for folder in (config.controlnet, start or config.controlnet)
        ]
        self.teacher = ControlledTransformer(teacher, branches[0].requires_grad_(False))
        self.student = ControlledTransformer(student, branches[1].train())
        self.trained = branches[1]

    def make_fake_model(self) -> tuple[FlowModel, nn.Module]:
        """A copy of the controlled teacher whose transformer and branch are both trained."""
        model = ControlledTransformer(
            with_guidance(self.teacher.transformer).to(distributed.device()),
            copy.deepcopy(self.teacher.controlnet).requires_grad_(True),
        )
        return model, nn.ModuleList([model.transformer, model.controlnet])

    def context(
        self, model: FlowModel, embeds: Tensor, mask: Tensor | None, indices: Tensor
    ) -> CaptionContext:
        """Captions and conditions."""
        assert isinstance(model, ControlledTransformer)
        return model.encode(self.conditions.latents(indices), embeds, mask)

    def validation_context(self, model: FlowModel, embeds: Tensor, mask: Tensor | None) -> CaptionContext:
        """Captions and conditions of validation samples."""
        assert isinstance(model, ControlledTransformer)
        return model.encode(self.conditions.validation[: len(embeds)], embeds, mask)

    def trajectory_settings(self) -> Sequence[object]:
        """The branch and the conditions too."""
        latents = {**self.source.cache.facts, "conditions": str(self.conditions.cache.facts)}
        modules = self.teacher.transformer, self.teacher.controlnet
        return trajectory_settings(self.config, latents, self.source.encoder.text_encoder, *modules)

    def show(self, folder: Path, count: int) -> None:
        """Writes the conditions."""
        self.conditions.show(folder, count)

    def export(self, folder: Path) -> None:
        """Writes a whole pipeline folder, the branch in bf16, the rest as it was."""
        shutil.copytree(self.student_folder, folder, dirs_exist_ok=True)
        save_model(self.student.controlnet, folder / "controlnet", dtype=torch.bfloat16)


class ControlStudentStage(StudentStage):
    """The distillation of `StudentStage` for a control branch."""

    def __init__(self, config: ControlStudentRun, *, report: Report) -> None:
        super().__init__(config, report=report, make_models=ControlledModels)
