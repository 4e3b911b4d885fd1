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

from sana_sprint.images import grid, to_pil
from sana_sprint.models.autoencoder import AutoencoderDC
from sana_sprint.models.controlnet import SanaControlNetModel
from sana_sprint.models.text_encoder import (
    PromptEmbeddings,
    PromptEncoder,
    load_text_encoder,
    load_tokenizer,
)
from sana_sprint.models.transformer import CaptionContext, SanaTransformer2DModel
from sana_sprint.train.cache.latents import LatentCache, cached_latents
from sana_sprint.train.cache.trajectories import trajectory_settings
from sana_sprint.train.config import ControlStudentRun, ControlTeacherRun
from sana_sprint.train.data import VALIDATION_START, open_source
from sana_sprint.train.data.pictures import fit, to_tensor
from sana_sprint.train.models.controlled import ConditionSource, ControlledTransformer
from sana_sprint.train.models.student import with_guidance
from sana_sprint.train.stages.base import Metrics, Report
from sana_sprint.train.stages.captions import FlowModel, frozen_embed, velocity_of
from sana_sprint.train.stages.flow import NUM_VALIDATION_CAPTIONS, FlowStage
from sana_sprint.train.stages.student import StudentStage
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

    def latents(self, indices: Tensor | None, count: int) -> Tensor:
        """(B,C,h,w) of the samples at these places of the cache, or of the first `count` validation samples."""
        if indices is None:
            return self.validation[:count]
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
        self.encoder = PromptEncoder(load_tokenizer(folder / "tokenizer"), text_encoder)
        self.embed = frozen_embed(config, self.encoder, self.cache.captions, report=report)
        self.transformer = load_model(
            SanaTransformer2DModel, folder / "transformer", dtype=torch.float32, device=self.device
        ).requires_grad_(False)
        controlnet = SanaControlNetModel.from_transformer(
            self.transformer, config.control.num_copies, config.control.topology
        ).train()
        self.controlled = ControlledTransformer(self.transformer, controlnet)
        self.controlled.gradient_checkpointing = config.gradient_checkpointing
        self.players = {"teacher": controlnet}

    def context(self, order: Tensor, embeds: Tensor, mask: Tensor) -> CaptionContext:
        """Captions and conditions."""
        return self.controlled.encode(self.conditions.latents(order, len(order)), embeds, mask)

    def velocity(self, context: CaptionContext) -> Velocity:
        """The steered teacher."""
        return velocity_of(self.controlled, context)

    def validation_contexts(self, embeddings: PromptEmbeddings) -> tuple[CaptionContext, CaptionContext]:
        """Both follow the conditions: guidance is about the caption."""
        latents = self.conditions.latents(None, len(embeddings.embeds))
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


class ControlStudentStage(StudentStage):
    """The distillation of `StudentStage`, of which only the branch learns. It starts as the teacher's, or as that of `start`."""

    config: ControlStudentRun

    def models(self) -> tuple[FlowModel, FlowModel, nn.Module]:
        """The steered teacher, the steered student, and the student's branch."""
        self.conditions = Conditions(
            self.config, self.config.condition, self.cache, self.autoencoder, report=self.report
        )
        teacher = self.load_transformer(self.folder)
        self.student_folder = resolve_folder(str(self.config.student))
        student = self.load_transformer(self.student_folder)
        start = self.config.start and resolve_folder(str(self.config.start)) / "controlnet"
        branches = [
            load_model(SanaControlNetModel, folder, dtype=torch.float32, device=self.device)
            for folder in (self.config.controlnet, start or self.config.controlnet)
        ]
        return (
            ControlledTransformer(teacher, branches[0].requires_grad_(False)),
            ControlledTransformer(student, branches[1].train()),
            branches[1],
        )

    @property
    def trajectory_settings(self) -> Sequence[object]:
        """The branch and the conditions too."""
        assert isinstance(self.teacher, ControlledTransformer)
        latents = {**self.cache.facts, "conditions": str(self.conditions.cache.facts)}
        modules = self.teacher.transformer, self.teacher.controlnet
        return trajectory_settings(self.config, latents, self.encoder.text_encoder, *modules)

    def follower(self) -> tuple[FlowModel, nn.Module]:
        """A steered model whose transformer and branch both learn."""
        assert isinstance(self.teacher, ControlledTransformer)
        follower = ControlledTransformer(
            with_guidance(self.teacher.transformer).to(self.device),
            copy.deepcopy(self.teacher.controlnet).requires_grad_(True),
        )
        return follower, nn.ModuleList([follower.transformer, follower.controlnet])

    def context(
        self, model: FlowModel, embeds: Tensor, mask: Tensor | None, indices: Tensor | None
    ) -> CaptionContext:
        """Captions and conditions."""
        assert isinstance(model, ControlledTransformer)
        return model.encode(self.conditions.latents(indices, len(embeds)), embeds, mask)

    def validate(self, folder: Path, step: int) -> Metrics:
        """As a student's, beside the conditions."""
        self.conditions.show(folder, len(self.validation_captions))
        return super().validate(folder, step)

    def export(self, folder: Path) -> None:
        """Writes a whole pipeline folder, the branch in bf16, the rest as it was."""
        shutil.copytree(self.student_folder, folder, dirs_exist_ok=True)
        assert isinstance(self.transformer, ControlledTransformer)
        save_model(self.transformer.controlnet, folder / "controlnet", dtype=torch.bfloat16)
