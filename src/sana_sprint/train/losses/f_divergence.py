"""f-distill (arXiv 2502.15681): distribution matching by another divergence than the reverse Kullback-Leibler one.

For a divergence D_f(p || q) = E_q[f(p/q)] of the data p and the student's pictures q the gradient of distribution matching gets a
factor h(r) = r^2 f''(r) at each noised picture, r = p/q. The discriminator estimates it: for the logistic loss the best logit is
log r. (The best logit of the hinge loss is the sign of p - q, from which no ratio can be had.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from sana_sprint.models.transformer import CaptionContext
from sana_sprint.train.losses.adversarial import Adversarial, DiscriminatorConfig
from sana_sprint.train.losses.distribution_matching import DistributionMatching, MatchingConfig
from sana_sprint.train.metrics import Metrics
from sana_sprint.train.sections import Section
from sana_sprint.trigflow import expand_like, flow_to_trig

if TYPE_CHECKING:
    from sana_sprint.train.distillation import Batch, Distillation

_MAX_LOG_RATIO = 10.0  # beyond it exp is of no use; the bounds of ratios are nearer

Divergence = Literal[
    "reverse-kl",
    "softened-reverse-kl",
    "jensen-shannon",
    "squared-hellinger",
    "forward-kl",
    "jeffreys",
    "neyman",
]

# h(r) up to a constant factor, which the normalisation removes (the paper's table 1).
WEIGHTS: dict[Divergence, Callable[[Tensor], Tensor]] = {
    "reverse-kl": torch.ones_like,
    "softened-reverse-kl": lambda r: 1 / (1 + r),
    "jensen-shannon": lambda r: r / (1 + r),
    "squared-hellinger": torch.sqrt,
    "forward-kl": lambda r: r,
    "jeffreys": lambda r: 1 + r,
    "neyman": lambda r: 1 / r,
}


class FDivergenceConfig(MatchingConfig):
    """`[f_divergence]`: as `[matching]`, with the divergence. The run needs a `[discriminator]` with the logistic loss."""

    divergence: Divergence = "jensen-shannon"
    # Density ratios are held between these.
    ratio_bounds: tuple[PositiveFloat, PositiveFloat] = (0.1, 20.0)
    # Ranges of flow time, equally wide, in each of which ratios are divided by their mean. The released code has 10 for 2048
    # pictures; a range with one picture makes its ratio 1, so a part of a step should have several for each.
    time_bins: int = Field(default=4, ge=1)


class FDivergenceMatching(DistributionMatching):
    """Distribution matching whose samples are weighed by the discriminator's density ratio."""

    Config = FDivergenceConfig

    def __init__(
        self, matching: DistributionMatching, config: FDivergenceConfig, adversarial: Adversarial
    ) -> None:
        super().__init__(matching.config, matching.fake_model, matching.players["fake_model"])
        self.weighting = config
        self.adversarial = adversarial

    @classmethod
    def check(cls, sections: Mapping[str, Section]) -> None:
        """It needs density ratios of real and student's pictures, with nothing else among the fakes."""
        judge = sections.get("discriminator")
        found = "there is no [discriminator]"
        if isinstance(judge, DiscriminatorConfig):
            if judge.loss == "logistic" and not judge.misaligned_pairs:
                found = ""
            else:
                pairs = str(judge.misaligned_pairs).lower()
                found = f'it has loss = "{judge.loss}" and misaligned_pairs = {pairs}'
        if found:
            raise ValueError(
                '[f_divergence] needs a [discriminator] with loss = "logistic" and misaligned_pairs = false, whose logits '
                f"are logarithms of density ratios; {found}"
            )
        if "matching" in sections:
            raise ValueError("[f_divergence] takes the place of [matching]; the run has both")

    @classmethod
    def make(cls, distillation: Distillation, section: Section | None) -> Self | None:
        """With the discriminator of the run's adversarial loss."""
        if not isinstance(section, FDivergenceConfig):
            return None
        (adversarial,) = (loss for loss in distillation.losses if isinstance(loss, Adversarial))
        matching = DistributionMatching.make(distillation, section)
        assert matching is not None
        return cls(matching, section, adversarial)

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
        return factors_of(
            logits.float().flatten(1).mean(1),
            flow_t,
            self.weighting.divergence,
            bounds=self.weighting.ratio_bounds,
            time_bins=self.weighting.time_bins,
        )


def factors_of(
    log_r: Tensor,
    flow_t: Tensor,
    divergence: Divergence,
    *,
    bounds: tuple[float, float] = (0.1, 20.0),
    time_bins: int = 4,
) -> Tensor:
    """h(r) of each sample over the mean of the samples: (B,).

    Over the student's pictures the mean of a density ratio is 1 at every noise level, which the discriminator's own level may
    miss: r, held within its bounds, is divided by its mean at similar times. Then h(r) / mean h. Section 3.3 of the paper, with
    means over this batch alone, as the released code's defaults have it.

    Args:
        log_r: log density ratios (B,).
        flow_t: in [0,1], (B,).
        divergence: the name of h in `WEIGHTS`.
        bounds: of r.
        time_bins: into how many ranges of equal width times are divided.
    """
    ratio = log_r.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp().clamp(*bounds)
    place = (flow_t * time_bins).long().clamp(0, time_bins - 1)
    zeros = ratio.new_zeros(time_bins)
    count = zeros.index_add(0, place, torch.ones_like(ratio))
    mean = zeros.index_add(0, place, ratio) / count.clamp_min(1)
    h = WEIGHTS[divergence](ratio / mean[place])
    return h / h.mean()
