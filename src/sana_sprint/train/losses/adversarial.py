"""The adversarial loss (LADD): losses of the student and of a discriminator on the frozen teacher's features.

SANA-Sprint (arXiv 2503.09641), section 3.3, after latent adversarial diffusion distillation (arXiv 2403.12015).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from sana_sprint.models.layers import autocast_off
from sana_sprint.models.transformer import CaptionContext
from sana_sprint.train.losses.base import Loss
from sana_sprint.train.metrics import Metrics
from sana_sprint.train.models.base import FlowModel
from sana_sprint.train.models.discriminator import Discriminator
from sana_sprint.train.sections import OptimizerConfig, Section
from sana_sprint.trigflow import add_noise, expand_like, flow_to_trig, lognormal_times

if TYPE_CHECKING:
    from sana_sprint.train.distillation import Batch, Distillation


class DiscriminatorConfig(Section):
    """`[discriminator]`: heads on the frozen teacher's features, and the student's adversarial loss."""

    # The teacher's blocks, from 0, that have a head.
    blocks: tuple[int, ...]
    # Factor of the adversarial loss beside the consistency loss.
    weight: float = Field(default=0.5, gt=0)
    # Angles at which real and student pictures are noised before they are judged: arctan(e^N(mean, std) / sigma_d).
    time_mean: float = -0.6
    time_std: float = Field(default=1.0, gt=0)
    # Whether real pictures with another picture's caption count as fakes too.
    misaligned_pairs: bool = True
    # "hinge" is the paper's; the logits of "logistic" are logarithms of density ratios (`f_divergence`).
    loss: Literal["hinge", "logistic"] = "hinge"
    # Factor of the gradient penalty on the heads' inputs.
    r1_weight: float = Field(default=0.0, ge=0)
    optimizer: OptimizerConfig


class Adversarial(Loss):
    """The adversarial loss of the student, and the loss of the discriminator's heads."""

    Config = DiscriminatorConfig

    def __init__(self, config: DiscriminatorConfig, teacher: FlowModel) -> None:
        self.config = config
        self.teacher = teacher
        self.discriminator = Discriminator(teacher.config.width, teacher.config.num_layers, config.blocks)
        self.players = {"discriminator": self.discriminator}

    @classmethod
    def make(cls, distillation: Distillation, section: Section | None) -> Self | None:
        """With heads on the run's teacher."""
        if not isinstance(section, DiscriminatorConfig):
            return None
        made = cls(section, distillation.models.teacher)
        made.discriminator.to(distillation.device)
        return made

    def student(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The weighted `student_loss` of the pictures that the student draws."""
        loss = self.student_loss(batch.fake, batch.captioned)
        return self.config.weight * loss, {"adversarial_loss": loss.item()}

    def player(self, name: str, batch: Batch) -> tuple[Tensor, Metrics]:
        """The `discriminator_loss` of the student's pictures and the real ones."""
        return self.discriminator_loss(batch.fake, batch.u0, batch.captioned)

    def student_loss(self, fake: Tensor, context: CaptionContext) -> Tensor:
        """The adversarial loss of the student's pictures; the heads get no gradient.

        The discriminator's own graph, as large as the student's, is gone when this returns: the gradient by the pictures
        is taken at once, and the loss carries it on to the student.

        Args:
            fake: the pictures, clean latents (B,C,H,W), with gradients.
            context: the teacher's, of their captions.
        """
        self.discriminator.requires_grad_(False)
        judged = fake.detach().requires_grad_()
        t = self.draw_times(len(fake))
        generator = hinge_generator if self.config.loss == "hinge" else logistic_generator
        loss = generator(self.discriminator(self.features(judged, t, context)))
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
            t = self.draw_times(len(u0))
            real_features = self.features(u0, t, context)
            fake_context = context
            if self.config.misaligned_pairs and len(u0) > 1:  # one alone would meet its own caption
                fake = torch.cat([fake, u0.roll(1, 0)])
                t = torch.cat([t, self.draw_times(len(u0))])
                fake_context = context.index(torch.arange(len(u0), device=u0.device).repeat(2))
            fake_features = self.features(fake, t, fake_context)
        if self.config.r1_weight:
            real_features = [features.requires_grad_() for features in real_features]
        real = self.discriminator(real_features)
        judge = hinge_discriminator if self.config.loss == "hinge" else logistic_discriminator
        loss, metrics = judge(real, self.discriminator(fake_features))
        if self.config.r1_weight:
            penalty = r1_penalty(real, real_features)
            loss = loss + self.config.r1_weight / 2 * penalty
            metrics["r1"] = penalty.item()
        return loss, metrics

    def logits(self, x: Tensor, flow_t: Tensor, context: CaptionContext) -> Tensor:
        """Of pictures noised in flow space, x = (1-s) x0 + s z (B,C,H,W) at flow times s (B,): (B,n)."""
        t = flow_to_trig(flow_t)
        u = x * expand_like(torch.cos(t) + torch.sin(t), x)
        logits: Tensor = self.discriminator(self.discriminator.features(self.teacher, u, t, context))
        return logits

    def draw_times(self, count: int) -> Tensor:
        return lognormal_times(
            count, mean=self.config.time_mean, std=self.config.time_std, device=self.teacher.device
        )

    def features(self, u0: Tensor, t: Tensor, context: CaptionContext) -> list[Tensor]:
        noised = add_noise(u0, torch.randn_like(u0), t)
        return self.discriminator.features(self.teacher, noised, t, context)


def hinge_discriminator(real: Tensor, fake: Tensor) -> tuple[Tensor, dict[str, float]]:
    """(mean max(0, 1 - real) + mean max(0, 1 + fake)) / 2, the hinge loss of the heads (section 3.3).

    Args:
        real: logits of noised pictures with their own captions, of any shape.
        fake: logits of noised student pictures, and of pictures with other captions.

    Returns:
        The loss, and what tells a stuck game: mean logits, and the saturated parts, which give no gradient.
    """
    loss = (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()) / 2
    metrics = {
        "real_logit": real.detach().mean().item(),
        "fake_logit": fake.detach().mean().item(),
        "real_saturated": (real.detach() > 1).float().mean().item(),
        "fake_saturated": (fake.detach() < -1).float().mean().item(),
    }
    return loss, metrics


def hinge_generator(fake: Tensor) -> Tensor:
    """-mean of the logits: what the student minimises."""
    return -fake.mean()


def logistic_discriminator(real: Tensor, fake: Tensor) -> tuple[Tensor, dict[str, float]]:
    """(mean log(1 + e^-real) + mean log(1 + e^fake)) / 2, the first GAN's loss; see `hinge_discriminator`.

    Its best logit is log(p_real/p_fake).
    """
    loss = (nn.functional.softplus(-real).mean() + nn.functional.softplus(fake).mean()) / 2
    return loss, {"real_logit": real.detach().mean().item(), "fake_logit": fake.detach().mean().item()}


def logistic_generator(fake: Tensor) -> Tensor:
    """mean log(1 + e^-fake), the non-saturating loss."""
    return nn.functional.softplus(-fake).mean()


def r1_penalty(logits: Tensor, features: Sequence[Tensor]) -> Tensor:
    """Squared gradient norm of each sample's summed logits by the heads' inputs, mean over samples (R1).

    Args:
        logits: of real samples, (B,n).
        features: what the heads made them from, (B,N,D) each, with `requires_grad`.
    """
    with autocast_off(logits.device):  # a backward pass runs in the dtypes of its forward
        gradients = torch.autograd.grad(logits.sum(), list(features), create_graph=True)
    squares: list[Tensor] = [gradient.float().square().sum() for gradient in gradients]
    return torch.stack(squares).sum() / len(logits)
