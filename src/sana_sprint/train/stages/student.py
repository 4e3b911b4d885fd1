"""Distilling a teacher into a student for 1 to 4 steps: consistency (sCM) and adversarial (LADD) losses, and others.

Algorithm 2 of SANA-Sprint (arXiv 2503.09641). The stage sums the losses that the run asks for; the student and the modules of
the losses are trained in turn, a step each.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from sana_sprint import backends
from sana_sprint.backends.prompt_cache import CachedPromptEncoder
from sana_sprint.images import grid, to_pil
from sana_sprint.models.autoencoder import AutoencoderDC
from sana_sprint.models.text_encoder import PromptEncoder, load_text_encoder, load_tokenizer
from sana_sprint.models.transformer import CaptionContext, SanaTransformer2DModel
from sana_sprint.sampling import PUBLISHED_GUIDANCE, at_any_step, consistency, schedule
from sana_sprint.scheduler import SCMScheduler
from sana_sprint.train import distributed
from sana_sprint.train.cache.latents import LatentCache, latents_of_run
from sana_sprint.train.cache.trajectories import trajectory_settings
from sana_sprint.train.config import StudentRun
from sana_sprint.train.data import channels_last
from sana_sprint.train.distillation import Batch, Distillation, DistillationModels
from sana_sprint.train.losses import LOSSES
from sana_sprint.train.losses.base import Loss
from sana_sprint.train.models.base import FlowModel, velocity_of
from sana_sprint.train.models.student import Student, with_guidance
from sana_sprint.train.sections import Section
from sana_sprint.train.stages.base import Metrics, Part, Report, autocast
from sana_sprint.train.stages.captions import embed, frozen_embed
from sana_sprint.trigflow import flow_denoiser
from sana_sprint.weights import ModelIndex, load_model, resolve_folder, save_model, write_model_index

NUM_VALIDATION_CAPTIONS = 8


@dataclass(frozen=True)
class TeacherFolder:
    """The frozen parts of a teacher's pipeline folder and the cache of latents that belongs to them."""

    folder: Path
    encoder: PromptEncoder
    autoencoder: AutoencoderDC
    cache: LatentCache
    validation_captions: Sequence[str]

    @classmethod
    def load(cls, config: StudentRun, report: Report) -> TeacherFolder:
        """From `config.teacher`, with the latents of `config.data`."""
        device, folder = distributed.device(), resolve_folder(str(config.teacher))
        text_encoder = load_text_encoder(folder / "text_encoder", device=device).requires_grad_(False)
        encoder = CachedPromptEncoder(load_tokenizer(folder / "tokenizer"), text_encoder)
        autoencoder = channels_last(
            backends.apply(load_model(AutoencoderDC, folder / "vae", dtype=torch.float32, device=device))
        )
        cache, captions = latents_of_run(
            config, autoencoder, num_validation=NUM_VALIDATION_CAPTIONS, report=report
        )
        return cls(folder, encoder, autoencoder, cache, captions)


class StudentModels(DistillationModels, Protocol):
    """The models of a stage, with their pictures for validation and their export."""

    def show(self, folder: Path, count: int) -> None:
        """Writes further pictures beside those of the first `count` validation samples."""

    def export(self, folder: Path) -> None:
        """Writes a whole pipeline folder."""


class TextModels:
    """A teacher and a student conditioned on captions alone. The student starts equal to its teacher, or from `start`."""

    def __init__(self, config: StudentRun, source: TeacherFolder, report: Report) -> None:
        self.config, self.source = config, source
        self.teacher = load_transformer(source.folder)
        self.student = with_guidance(self.teacher).to(distributed.device())
        if config.start is not None:
            self.student.load_state_dict(load_transformer(resolve_folder(str(config.start))).state_dict())
        self.trained = self.student

    def make_fake_model(self) -> tuple[FlowModel, nn.Module]:
        """A copy of the teacher with guidance embedding, all of it trained."""
        model = with_guidance(self.teacher).to(distributed.device())
        return model, model

    def context(
        self, model: FlowModel, embeds: Tensor, mask: Tensor | None, indices: Tensor
    ) -> CaptionContext:
        """The captions' context; there is nothing else to be conditioned on."""
        return self.validation_context(model, embeds, mask)

    def validation_context(self, model: FlowModel, embeds: Tensor, mask: Tensor | None) -> CaptionContext:
        """The same for validation samples."""
        assert isinstance(model, SanaTransformer2DModel)
        return model.encode_caption(embeds, mask)

    def trajectory_settings(self) -> Sequence[object]:
        """The run's settings, the latents, the text encoder and the teacher."""
        source = self.source
        return trajectory_settings(self.config, source.cache.facts, source.encoder.text_encoder, self.teacher)

    def show(self, folder: Path, count: int) -> None:
        """Nothing: captions are written by the stage."""

    def export(self, folder: Path) -> None:
        """Writes a whole pipeline folder, weights in bf16."""
        save_model(self.student, folder / "transformer", dtype=torch.bfloat16)
        for part in ("text_encoder", "tokenizer", "vae"):
            shutil.copytree(self.source.folder / part, folder / part, dirs_exist_ok=True)
        SCMScheduler().save_pretrained(folder / "scheduler")
        write_model_index(folder, sprint_index(type(self.source.encoder.tokenizer).__name__))


def load_transformer(folder: Path) -> SanaTransformer2DModel:
    """A pipeline folder's, frozen. fp32 under autocast: published weights are bf16, in which residuals and times lose bits."""
    transformer = load_model(
        SanaTransformer2DModel, folder / "transformer", dtype=torch.float32, device=distributed.device()
    )
    return backends.apply(transformer).requires_grad_(False)


class StudentStage:
    """See `stages.base.Stage`.

    Args:
        config: the run.
        report: receives lines about caches.
        make_models: the teacher and the student of the run.
    """

    def __init__(
        self,
        config: StudentRun,
        *,
        report: Report,
        make_models: Callable[[StudentRun, TeacherFolder, Report], StudentModels] = TextModels,
    ) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.source = source = TeacherFolder.load(config, report)
        embed = frozen_embed(config, source.encoder, source.cache.captions, report=report)
        self.models = make_models(config, source, report)
        self.distillation = Distillation(
            config,
            self.models,
            source.cache,
            embed,
            device=distributed.device(),
            autocast=partial(autocast, config),
            report=report,
        )
        self.losses = make_losses(self.distillation, config.sections())
        size = math.prod(source.cache.shape)
        self.student = Student(self.models.student, size, self.models.trained).to(distributed.device())
        self.distillation.student = self.student

    @property
    def players(self) -> Mapping[str, nn.Module]:
        """The student and the modules of the losses."""
        return {
            "student": self.student,
            **{name: each for loss in self.losses for name, each in loss.players.items()},
        }

    @property
    def kept(self) -> Mapping[str, nn.Module]:
        """The modules that losses keep."""
        return {name: each for loss in self.losses for name, each in loss.kept.items()}

    @property
    def data(self) -> Mapping[str, str]:
        """The facts of the latents and of the losses."""
        facts = {name: fact for loss in self.losses for name, fact in loss.facts.items()}
        return {**self.source.cache.facts, **facts}

    def player(self, step: int) -> str:
        """All are trained in turn, the student first."""
        names = list(self.players)
        return names[step % len(names)]

    def loss(self, part: Part) -> tuple[Tensor, Metrics]:
        """The sum of the student's losses in its turn, else the loss of the step's player, on samples of its own."""
        name = self.player(part.step)
        batch = Batch(self.distillation, part, is_students_turn=name == "student")
        with autocast(self.config):
            if name != "student":
                (owner,) = (loss for loss in self.losses if name in loss.players)
                return owner.player(name, batch)
            total, metrics = torch.zeros((), device=distributed.device()), Metrics()
            for each in self.losses:
                loss, found = each.student(batch)
                total = total + loss
                metrics |= found
            return total, metrics

    def validate(self, folder: Path, step: int) -> Metrics:
        """Pictures of fixed prompts from fixed noise: a row each at 1, 2 and 4 steps."""
        captions, autoencoder = self.source.validation_captions, self.source.autoencoder
        device, shape = distributed.device(), (len(captions), *self.source.cache.shape)
        self.models.show(folder, len(captions))
        with autocast(self.config):
            embeddings = embed(self.source.encoder, captions, instruction=True)
            student = self.models.student
            context = self.models.validation_context(student, embeddings.embeds, embeddings.mask)
            guidance = torch.full((shape[0],), PUBLISHED_GUIDANCE, device=device)
            denoiser = flow_denoiser(velocity_of(student, context, guidance))
            rows = []
            for num_steps in (1, 2, 4):
                generator = torch.Generator().manual_seed(0)

                def draw(generator: torch.Generator = generator) -> Tensor:
                    return torch.randn(shape, generator=generator).to(device)

                latent = consistency(at_any_step(denoiser), draw(), schedule(num_steps), draw_noise=draw)
                rows.append(autoencoder.decode(latent / autoencoder.config.scaling_factor).float())
        folder.mkdir(parents=True, exist_ok=True)
        grid(to_pil(torch.cat(rows)), columns=shape[0]).save(folder / f"{step:08d}.png")
        (folder / "captions.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
        return {"latent_rms": latent.square().mean().sqrt().item()}

    def export(self, folder: Path) -> None:
        """Writes a whole pipeline folder."""
        self.models.export(folder)


def make_losses(distillation: Distillation, sections: Mapping[str, Section]) -> list[Loss]:
    """The losses that a run asks for, from its sections, in the order of `losses.LOSSES`."""
    losses: list[Loss] = []
    for name, loss in LOSSES.items():
        if (made := loss.make(distillation, sections.get(name))) is not None:
            losses.append(made)
            distillation.losses.append(made)
    return losses


def sprint_index(tokenizer_class: str) -> ModelIndex:
    """The model_index.json of a SANA-Sprint pipeline, with the published class names."""
    return ModelIndex(
        class_name="SanaSprintPipeline",
        components={
            "scheduler": ("diffusers", "SCMScheduler"),
            "text_encoder": ("transformers", "Gemma2Model"),
            "tokenizer": ("transformers", tokenizer_class),
            "transformer": ("diffusers", "SanaTransformer2DModel"),
            "vae": ("diffusers", "AutoencoderDC"),
        },
    )
