"""The data and models of a distillation, and a batch of it as the losses see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from sana_sprint.backends.explicit_attention import set_fused_attention
from sana_sprint.models.text_encoder import PromptEmbeddings
from sana_sprint.models.transformer import CaptionContext
from sana_sprint.train.cache.latents import LatentCache
from sana_sprint.train.data.sampler import Part
from sana_sprint.train.losses.flow import guided
from sana_sprint.train.models.base import Embed, FlowModel, velocity_of
from sana_sprint.train.models.student import Student
from sana_sprint.train.sections import DistillationRun
from sana_sprint.trigflow import (
    T_MAX,
    Denoiser,
    Velocity,
    add_noise,
    flow_denoiser,
    lognormal_times,
    to_clean,
)

SEED_STRIDE = 1_000_003  # a prime between the seeds of a run's trajectories


class DistillationModels(Protocol):
    """A teacher and a student with their conditions. A stage's student may be a transformer or a control branch."""

    @property
    def teacher(self) -> FlowModel:
        """The frozen teacher."""

    @property
    def student(self) -> FlowModel:
        """The student, with guidance embedding."""

    @property
    def trained(self) -> nn.Module:
        """The part of the student that is trained."""

    def make_fake_model(self) -> tuple[FlowModel, nn.Module]:
        """A flow model with guidance embedding that starts as the teacher, and its trained part."""

    def context(
        self, model: FlowModel, embeds: Tensor, mask: Tensor | None, indices: Tensor
    ) -> CaptionContext:
        """A model's context for embedded captions (B,L,D) of the samples at these places of the cache."""

    def validation_context(self, model: FlowModel, embeds: Tensor, mask: Tensor | None) -> CaptionContext:
        """A model's context for the embedded captions of the first B validation samples."""

    def trajectory_settings(self) -> Sequence[object]:
        """The dependencies of the teacher's trajectories, as `cache.files.digest` takes them."""


@dataclass(frozen=True)
class Samples:
    """Clean latents (B,C,H,W), their captions and guidance scales, and the teacher's context."""

    u0: Tensor
    captions: Sequence[str]
    instruction: bool  # whether the complex human instruction precedes the captions
    embeddings: PromptEmbeddings
    guidance: Tensor  # (B,)
    captioned: CaptionContext  # the teacher's
    indices: Tensor  # (B,), of the samples in the cache


class Distillation:
    """A run's configuration, data and models, with the operations that several losses share.

    `student` is set once the losses with random initial weights are made, so that these do not depend on it. `losses` are those
    made so far, for a loss that builds on another.
    """

    student: Student

    def __init__(
        self,
        config: DistillationRun,
        models: DistillationModels,
        cache: LatentCache,
        embed: Embed,
        *,
        device: torch.device,
        autocast: Callable[[], torch.autocast],
        report: Callable[[str], None],
    ) -> None:
        self.config = config
        self.models = models
        self.cache = cache
        self.embed = embed
        self.device = device
        self.report = report
        self.losses: list[object] = []
        self._autocast = autocast
        for model in (models.teacher, models.student):
            self.prepare(model)

    def prepare(self, model: FlowModel) -> None:
        """Applies the run's settings to a model whose forward and backward passes it uses."""
        # The teacher's too: the adversarial loss is differentiated through it.
        model.gradient_checkpointing = self.config.gradient_checkpointing
        # On a CPU the fused kernel's backward pass is slower than the plain one (docs/log.md).
        set_fused_attention(model.blocks, self.device.type != "cpu")

    @torch.no_grad()
    def samples(self, order: Tensor) -> Samples:
        """The samples at these places of the cache, with guidance scales drawn at random."""
        u0, captions = self.cache.batch(order)
        u0 = u0.to(self.device)
        scales = torch.tensor(self.config.guidance_scales)
        guidance = scales[torch.randint(len(scales), (len(u0),))].to(self.device)
        instruction = float(torch.rand(())) < self.config.instruction_rate
        embeddings = self.embed(captions, instruction=instruction)
        captioned = self.models.context(self.models.teacher, embeddings.embeds, embeddings.mask, order)
        return Samples(u0, captions, instruction, embeddings, guidance, captioned, order)

    def guided_teacher(self, samples: Samples) -> Velocity:
        """The guided teacher. Guidance is affine in the velocity, so it is the same before and after the transform."""
        # Bos alone is the empty prompt.
        uncaptioned = self.models.context(
            self.models.teacher, samples.embeddings.embeds[:, :1], None, samples.indices
        )
        return guided(
            velocity_of(self.models.teacher, samples.captioned),
            velocity_of(self.models.teacher, uncaptioned),
            samples.guidance,
            projected=self.config.guidance_projected,
            limit=self.config.guidance_limit,
            start=self.config.guidance_from,
        )

    def draw_times(self, count: int) -> Tensor:
        """Angles of the consistency loss: (count,)."""
        return lognormal_times(
            count, mean=self.config.time_mean, std=self.config.time_std, device=self.device
        )

    def pictures(self, student: Denoiser, u0: Tensor) -> Tensor:
        """One-step pictures (B,C,H,W) of the student, a part of them from pure noise (max-time weighting)."""
        t = self.draw_times(len(u0))
        t = torch.where(torch.rand(len(u0), device=t.device) < self.config.max_time_rate, T_MAX, t)
        u = add_noise(u0, torch.randn_like(u0), t)
        return to_clean(u, student(u, t).float(), t)

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """The student's passes inside recompute its blocks' activations, if the run has `recompute_pictures`."""
        student = self.models.student
        before = student.gradient_checkpointing
        student.gradient_checkpointing = before or self.config.recompute_pictures
        try:
            yield
        finally:
            student.gradient_checkpointing = before

    @contextmanager
    def seeded(self, number: int) -> Iterator[None]:
        """The run's precision, and torch's generators seeded by the run and `number`; restored at the end."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self._autocast():
            torch.manual_seed(self.config.seed * SEED_STRIDE + number)
            yield


class Batch:
    """A part of a step. Its properties are computed when a loss first asks, in that order, and shared by all losses.

    `is_students_turn` False: the student's pictures have no gradient.
    """

    def __init__(self, distillation: Distillation, part: Part, *, is_students_turn: bool) -> None:
        self.distillation = distillation
        self.part = part
        self.models = distillation.models
        self._is_students_turn = is_students_turn

    @property
    def step(self) -> int:
        """The optimisation step, counted over all players."""
        return self.part.step

    @cached_property
    def samples(self) -> Samples:
        """The samples of this part."""
        config, cache = self.distillation.config, self.distillation.cache
        order = cache.shuffled(self.part.indices, batch_size=config.schedule.batch_size, seed=config.seed)
        return self.distillation.samples(order)

    @property
    def u0(self) -> Tensor:
        """Clean latents (B,C,H,W)."""
        return self.samples.u0

    @property
    def guidance(self) -> Tensor:
        """Guidance scales (B,)."""
        return self.samples.guidance

    @property
    def captioned(self) -> CaptionContext:
        """The teacher's context."""
        return self.samples.captioned

    @cached_property
    def context(self) -> CaptionContext:
        """The student's context."""
        return self._context(self.models.student)

    @cached_property
    def student(self) -> Denoiser:
        """The student with its context and guidance scales."""
        return flow_denoiser(self.velocity(self.models.student))

    @cached_property
    def teacher(self) -> Velocity:
        """The guided teacher."""
        return self.distillation.guided_teacher(self.samples)

    @cached_property
    def fake(self) -> Tensor:
        """The student's one-step pictures (B,C,H,W), with gradient in the student's turn only."""
        if self._is_students_turn:
            u0, student = self.u0, self.student
            with self.distillation.recomputing():
                return self.distillation.pictures(student, u0)
        with torch.no_grad():
            return self.distillation.pictures(self.student, self.u0)

    def velocity(self, model: FlowModel) -> Velocity:
        """A model with guidance embedding under the batch's captions and guidance scales."""
        context = self.context if model is self.models.student else self._context(model)
        return velocity_of(model, context, self.guidance)

    def draw_times(self) -> Tensor:
        """Fresh angles of the consistency loss: (B,)."""
        return self.distillation.draw_times(len(self.u0))

    def log_variance(self, t: Tensor) -> Tensor:
        """The learnt log variance of the consistency loss at angles (B,): (B,)."""
        return self.distillation.student.log_variance(t, self.guidance)

    def _context(self, model: FlowModel) -> CaptionContext:
        embeddings = self.samples.embeddings
        return self.models.context(model, embeddings.embeds, embeddings.mask, self.samples.indices)
