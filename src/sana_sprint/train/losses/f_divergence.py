"""f-distill (arXiv 2502.15681): distribution matching by another divergence than the reverse Kullback-Leibler one.

For a divergence D_f the gradient of distribution matching gets a factor h(r) = r^2 f''(r) at each noised picture, where r is the
density of the data over that of the student's pictures. The discriminator estimates it: for the logistic loss its logit is log r.
Heads trained by the hinge loss, as here, have logits of the right sign and order but mostly between -1 and 1, so the factors
stay within a few times of one another. They are divided by their mean over the part, as in the paper, so that the learning rate
keeps its meaning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Self

import torch
from torch import Tensor

from sana_sprint.models.transformer import CaptionContext
from sana_sprint.train.losses.adversarial import Adversarial
from sana_sprint.train.losses.distribution_matching import DistributionMatching, MatchingConfig
from sana_sprint.train.metrics import Metrics
from sana_sprint.train.sections import Section
from sana_sprint.trigflow import expand_like, flow_to_trig

if TYPE_CHECKING:
    from sana_sprint.train.distillation import Batch, Distillation

Divergence = Literal[
    "reverse-kl", "softened-reverse-kl", "jensen-shannon", "squared-hellinger", "forward-kl", "jeffreys"
]

# h(r) up to a constant factor, as a function of log r. From mode-seeking to mode-covering (the paper's table 1).
WEIGHTS: dict[Divergence, Callable[[Tensor], Tensor]] = {
    "reverse-kl": torch.ones_like,
    "softened-reverse-kl": lambda log_r: torch.sigmoid(-log_r),
    "jensen-shannon": torch.sigmoid,
    "squared-hellinger": lambda log_r: torch.exp(log_r / 2),
    "forward-kl": torch.exp,
    "jeffreys": lambda log_r: 1 + torch.exp(log_r),
}


class FDivergenceConfig(MatchingConfig):
    """`[f_divergence]`: as `[matching]`, with the divergence. The run needs a `[discriminator]`."""

    divergence: Divergence = "jensen-shannon"


class FDivergenceMatching(DistributionMatching):
    """Distribution matching whose samples are weighed by the discriminator's density ratio."""

    Config = FDivergenceConfig

    def __init__(
        self, matching: DistributionMatching, divergence: Divergence, adversarial: Adversarial
    ) -> None:
        super().__init__(matching.config, matching.fake_model, matching.players["fake_model"])
        self.divergence: Divergence = divergence
        self.adversarial = adversarial

    @classmethod
    def make(cls, distillation: Distillation, section: Section | None) -> Self | None:
        """With the discriminator of the run's adversarial loss.

        Raises:
            ValueError: the run has no discriminator, or `[matching]` too.
        """
        if not isinstance(section, FDivergenceConfig):
            return None
        adversarial = [loss for loss in distillation.losses if isinstance(loss, Adversarial)]
        if not adversarial or any(isinstance(loss, DistributionMatching) for loss in distillation.losses):
            raise ValueError("[f_divergence] needs a [discriminator], and takes the place of [matching]")
        matching = DistributionMatching.make(distillation, section)
        assert matching is not None
        return cls(matching, section.divergence, adversarial[0])

    def student(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The weighted `student_loss` of the pictures that the student draws."""
        factors: list[Tensor] = []

        def weigh(x: Tensor, flow_t: Tensor) -> Tensor:
            factors.append(self.factors(x, flow_t, batch.captioned))
            return factors[0]

        with torch.no_grad():
            fake_model = batch.velocity(self.fake_model)
        loss = self.student_loss(batch.fake, batch.teacher, fake_model, weigh=weigh)
        metrics = {"matching_loss": loss.item(), "matching_factor_max": factors[0].max().item()}
        return self.weight(batch.step) * loss, metrics

    def factors(self, x: Tensor, flow_t: Tensor, context: CaptionContext) -> Tensor:
        """h(r) over its mean, (B,), of pictures x (B,C,H,W) noised to flow times (B,)."""
        t = flow_to_trig(flow_t)
        u = x * expand_like(torch.cos(t) + torch.sin(t), x)
        discriminator = self.adversarial.discriminator
        logits = discriminator(discriminator.features(self.adversarial.teacher, u, t, context))
        return factors_of(logits.float().flatten(1).mean(1), self.divergence)


def factors_of(log_r: Tensor, divergence: Divergence) -> Tensor:
    """h(r) of each sample (B,) for its log density ratio, over the mean of the samples."""
    weights = WEIGHTS[divergence](log_r)
    return weights / weights.mean()
