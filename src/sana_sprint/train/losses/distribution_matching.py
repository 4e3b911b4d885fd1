"""Distribution matching: moves the student's pictures to where the teacher finds them likelier than a model of them does.

The score distillation of DMD (arXiv 2311.18828); as a part of a consistency distillation it is rCM's (arXiv 2510.08431).
SANA-Sprint has no such loss. Consistency alone covers every picture that a caption allows and averages some of them; this loss
is mode-seeking.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from sana_sprint.train.losses.base import Loss
from sana_sprint.train.losses.flow import flow_loss, logit_normal_times
from sana_sprint.train.metrics import Metrics
from sana_sprint.train.models.base import FlowModel
from sana_sprint.train.optim.optimizers import warmed_up
from sana_sprint.train.sections import OptimizerConfig, Section
from sana_sprint.trigflow import Velocity, expand_like

if TYPE_CHECKING:
    from sana_sprint.train.distillation import Batch, Distillation


class MatchingConfig(Section):
    """`[matching]`: the distribution-matching loss and its fake-score model."""

    # Factor of the loss beside the consistency loss; both move a picture by about 1 at most.
    weight: float = Field(default=1.0, gt=0)
    # Steps, of all players, over which the weight grows from 0.
    warmup_steps: int = Field(default=100, ge=0)
    # Flow times at which pictures are noised and the fake-score model is trained: sigmoid(N(mean, std)).
    time_mean: float = 0.0
    time_std: float = Field(default=1.2, gt=0)
    optimizer: OptimizerConfig


Weigh = Callable[[Tensor, Tensor], Tensor]


class DistributionMatching(Loss):
    """A flow model of the student's pictures (the fake-score model), compared with the teacher.

    Args:
        config: its settings.
        fake_model: starts as the teacher, with guidance embedding, since the student's pictures depend on the scale.
        trained: the trained part of it.
    """

    Config = MatchingConfig

    def __init__(self, config: MatchingConfig, fake_model: FlowModel, trained: nn.Module) -> None:
        self.config = config
        self.fake_model = fake_model
        self.players = {"fake_model": trained}

    @classmethod
    def make(cls, distillation: Distillation, section: Section | None) -> Self | None:
        """With a copy of the run's teacher as fake-score model."""
        if not isinstance(section, MatchingConfig):
            return None
        made = cls(section, *distillation.models.make_fake_model())
        distillation.prepare(made.fake_model)
        return made

    def student(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The weighted `student_loss` of the pictures that the student draws."""
        with torch.no_grad():  # the fake-score model gives a direction and is not trained by it
            fake_model = batch.velocity(self.fake_model)
        loss = self.student_loss(batch.fake, batch.teacher, fake_model)
        return self.weight(batch.step) * loss, {"matching_loss": loss.item()}

    def player(self, name: str, batch: Batch) -> tuple[Tensor, Metrics]:
        """The `fake_model_loss` of the student's pictures."""
        return self.fake_model_loss(batch.fake, batch.velocity(self.fake_model)), {}

    def student_loss(
        self, fake: Tensor, teacher: Velocity, fake_model: Velocity, *, weigh: Weigh | None = None
    ) -> Tensor:
        """Half the squared norm of `direction`, mean over samples; its gradient by the pictures is the direction.

        Args:
            fake: the student's pictures (B,C,H,W), with gradients.
            teacher: guided.
            fake_model: with the same conditions.
            weigh: factors of the samples (B,) from the noised pictures and their flow times (B,).
        """
        with torch.no_grad():
            flow_t = self.draw_times(fake)
            noise = torch.randn_like(fake)
            toward = direction(fake.float(), noise, flow_t, teacher, fake_model)
        moved = (fake - toward).detach()
        squares = (fake - moved).square().flatten(1).sum(1)
        if weigh is not None:
            with torch.no_grad():
                s = expand_like(flow_t, fake)
                factors = weigh((1 - s) * fake + s * noise, flow_t)
            squares = squares * factors
        return squares.mean() / 2

    def fake_model_loss(self, fake: Tensor, fake_model: Velocity) -> Tensor:
        """Flow matching on the student's pictures (B,C,H,W)."""
        return flow_loss(fake_model, fake, torch.randn_like(fake), self.draw_times(fake)).mean()

    def weight(self, step: int) -> float:
        """The factor of the loss at a step: it grows from 0 while the fake-score model catches up with the student."""
        return self.config.weight * warmed_up(step, self.config.warmup_steps)

    def draw_times(self, like: Tensor) -> Tensor:
        times = logit_normal_times(len(like), mean=self.config.time_mean, std=self.config.time_std)
        return times.to(like.device)


def direction(fake: Tensor, noise: Tensor, flow_t: Tensor, teacher: Velocity, fake_model: Velocity) -> Tensor:
    """The gradient of the loss with respect to the pictures (B,C,H,W).

    (fake model's - teacher's clean prediction) / ||picture - teacher's prediction||.

    Equations 7 and 8 of DMD with the norm in place of the mean size: a direction has a norm of about 1, as the consistency
    loss's has. Both predict from the same noised pictures; at flow time s a clean prediction is x - s v.
    """
    s = expand_like(flow_t, fake)
    x = (1 - s) * fake + s * noise
    wanted = x - s * teacher(x, flow_t).float()
    found = x - s * fake_model(x, flow_t).float()
    distance = (fake - wanted).flatten(1).norm(dim=1).clamp_min(1e-3)
    return (found - wanted) / expand_like(distance, fake)
