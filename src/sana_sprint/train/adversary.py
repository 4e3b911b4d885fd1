"""The adversarial half of the distillation (LADD; SANA-Sprint, section 3.3): what student and discriminator learn of each other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sana_sprint.models.layers import autocast_off
from sana_sprint.models.transformer import CaptionContext
from sana_sprint.train.conditioning import FlowModel
from sana_sprint.train.config import DiscriminatorConfig
from sana_sprint.train.discriminator import Discriminator
from sana_sprint.train.losses import hinge_discriminator, hinge_generator, r1_penalty
from sana_sprint.trigflow import T_MAX, Denoiser, add_noise, lognormal_times, to_clean


class Adversary:
    """A discriminator, its settings, and the frozen teacher through which it sees.

    `draw_times` (count -> (count,) angles) is how the student's own times are drawn.
    """

    def __init__(
        self,
        config: DiscriminatorConfig,
        teacher: FlowModel,
        draw_times: Callable[[int], Tensor],
    ) -> None:
        self.config = config
        self.teacher = teacher
        self.draw_times = draw_times
        self.discriminator = Discriminator(teacher.config.width, teacher.config.num_layers, config.blocks)

    def student_loss(self, student: Denoiser, u0: Tensor, context: CaptionContext) -> Tensor:
        """How fake the discriminator finds the student's one-step pictures; its heads get no gradient.

        The discriminator's own graph, as large as the student's, is gone when this returns: the gradient by the pictures
        is taken at once, and the loss carries it on to the student.

        Args:
            student: with gradients.
            u0: clean latents (B,C,H,W).
            context: the teacher's, of their captions.
        """
        self.discriminator.requires_grad_(False)
        fake = self._pictures(student, u0)
        judged = fake.detach().requires_grad_()
        t = self._judging_times(len(fake))
        loss = hinge_generator(self.discriminator(self._features(judged, t, context)))
        with autocast_off(judged.device):  # a backward pass runs in the dtypes of its forward
            (gradient,) = torch.autograd.grad(loss, judged)
        carried = (fake * gradient).sum()  # its gradient by the student's weights is the loss's
        return loss.detach() + carried - carried.detach()

    def discriminator_loss(
        self, student: Denoiser, u0: Tensor, context: CaptionContext
    ) -> tuple[Tensor, dict[str, float]]:
        """Real latents against the student's and, if so configured, against real ones with another's caption.

        Real and fake are noised to the same angles, with noise of their own. Arguments as for `student_loss`.
        """
        self.discriminator.requires_grad_(True)
        with torch.no_grad():
            fake = self._pictures(student, u0)
            t = self._judging_times(len(u0))
            real_features = self._features(u0, t, context)
            fake_context = context
            if self.config.misaligned_pairs and len(u0) > 1:  # one alone would meet its own caption
                fake = torch.cat([fake, u0.roll(1, 0)])
                t = torch.cat([t, self._judging_times(len(u0))])
                fake_context = context.index(torch.arange(len(u0), device=u0.device).repeat(2))
            fake_features = self._features(fake, t, fake_context)
        if self.config.r1_weight:
            real_features = [features.requires_grad_() for features in real_features]
        real = self.discriminator(real_features)
        loss, metrics = hinge_discriminator(real, self.discriminator(fake_features))
        if self.config.r1_weight:
            penalty = r1_penalty(real, real_features)
            loss = loss + self.config.r1_weight / 2 * penalty
            metrics["r1"] = penalty.item()
        return loss, metrics

    def _pictures(self, student: Denoiser, u0: Tensor) -> Tensor:
        """Clean predictions in one step, a part of them from pure noise (max-time weighting)."""
        t = self.draw_times(len(u0))
        t = torch.where(torch.rand(len(u0), device=t.device) < self.config.max_time_rate, T_MAX, t)
        u = add_noise(u0, torch.randn_like(u0), t)
        return to_clean(u, student(u, t).float(), t)

    def _judging_times(self, count: int) -> Tensor:
        return lognormal_times(
            count, mean=self.config.time_mean, std=self.config.time_std, device=self.teacher.device
        )

    def _features(self, u0: Tensor, t: Tensor, context: CaptionContext) -> list[Tensor]:
        noised = add_noise(u0, torch.randn_like(u0), t)
        return self.discriminator.features(self.teacher, noised, t, context)
