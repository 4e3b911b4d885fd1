"""The adversarial half of the distillation (LADD; SANA-Sprint, section 3.3): what student and discriminator learn of each other."""

from __future__ import annotations

import torch
from torch import Tensor

from sana_sprint.models.layers import autocast_off
from sana_sprint.models.transformer import CaptionContext
from sana_sprint.train.config import DiscriminatorConfig
from sana_sprint.train.losses.scm import hinge_discriminator, hinge_generator, r1_penalty
from sana_sprint.train.models.discriminator import Discriminator
from sana_sprint.train.stages.captions import FlowModel
from sana_sprint.trigflow import add_noise, lognormal_times


class Adversary:
    """A discriminator, its settings, and the frozen teacher through which it sees."""

    def __init__(self, config: DiscriminatorConfig, teacher: FlowModel) -> None:
        self.config = config
        self.teacher = teacher
        self.discriminator = Discriminator(teacher.config.width, teacher.config.num_layers, config.blocks)

    def student_loss(self, fake: Tensor, context: CaptionContext) -> Tensor:
        """How fake the discriminator finds the student's pictures; its heads get no gradient.

        The discriminator's own graph, as large as the student's, is gone when this returns: the gradient by the pictures
        is taken at once, and the loss carries it on to the student.

        Args:
            fake: the pictures, clean latents (B,C,H,W), with gradients.
            context: the teacher's, of their captions.
        """
        self.discriminator.requires_grad_(False)
        judged = fake.detach().requires_grad_()
        t = self._judging_times(len(fake))
        loss = hinge_generator(self.discriminator(self._features(judged, t, context)))
        with autocast_off(judged.device):  # a backward pass runs in the dtypes of its forward
            (gradient,) = torch.autograd.grad(loss, judged)
        carried = (fake * gradient).sum()  # its gradient by the student's weights is the loss's
        return loss.detach() + carried - carried.detach()

    def discriminator_loss(
        self, fake: Tensor, u0: Tensor, context: CaptionContext
    ) -> tuple[Tensor, dict[str, float]]:
        """Real latents u0 against the student's and, if so configured, against real ones with another's caption.

        Real and fake are noised to the same angles, with noise of their own. Arguments as for `student_loss`.
        """
        self.discriminator.requires_grad_(True)
        with torch.no_grad():
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

    def _judging_times(self, count: int) -> Tensor:
        return lognormal_times(
            count, mean=self.config.time_mean, std=self.config.time_std, device=self.teacher.device
        )

    def _features(self, u0: Tensor, t: Tensor, context: CaptionContext) -> list[Tensor]:
        noised = add_noise(u0, torch.randn_like(u0), t)
        return self.discriminator.features(self.teacher, noised, t, context)
