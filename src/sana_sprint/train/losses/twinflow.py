"""TwinFlow (arXiv 2512.05150): a student that learns the flow of its own pictures at negative time, and is corrected by it.

The network has two trajectories. At flow time s in (0, 1] it is the student, whose clean prediction x - s v(x, s) is the end of
the path. At -s it is the velocity of the flow from noise to the student's own pictures. Three terms are added:

* consistency: the prediction at s equals that of a slowly moving average of the student a small step down the teacher's path;
* self-adversarial: flow matching of the student's pictures at negative time;
* rectification: pictures move along the difference of the two velocities, which vanishes where both distributions are equal.

There is no discriminator, no further network that is trained, and no forward-mode derivative. The time embedding is the model's own:
its sinusoid takes -s, of which half of the features are the negatives of those of s, and what it means is learnt. The student is
used as a velocity in flow time, never through the change of variables, which is singular at an angle of -pi/4.

Differences from the paper and its code: the network has no second time, so that the velocity of the data is the guided teacher's
rather than its own; pictures are those that all losses share, a part of which start from noised data; all samples of a batch serve
all terms, where the code gives each a quarter; errors are squared without the code's weights (Barron's and one by time); the path to
time 0 is one step, where the code has two by default; and the rectification is not clamped.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from sana_sprint.train.ema import averaging_weight
from sana_sprint.train.losses.base import Loss
from sana_sprint.train.losses.flow import flow_loss, logit_normal_times
from sana_sprint.train.metrics import Metrics
from sana_sprint.train.models.base import FlowModel
from sana_sprint.train.optim.optimizers import warmed_up
from sana_sprint.train.sections import Section
from sana_sprint.trigflow import Velocity, expand_like, trig_to_flow

if TYPE_CHECKING:
    from sana_sprint.train.distillation import Batch, Distillation


class TwinFlowConfig(Section):
    """`[twinflow]`: consistency with an averaged student, and the twin trajectory at negative time."""

    # Factor of the whole loss.
    weight: float = Field(default=1.0, gt=0)
    # Factors of the terms beside the consistency term; both at 0 leave the discrete consistency loss alone.
    adversarial_weight: float = Field(default=1.0, ge=0)
    rectification_weight: float = Field(default=1.0, ge=0)
    # Steps, of all players, over which the rectification's weight grows from 0, while the twin trajectory is learnt.
    warmup_steps: int = Field(default=100, ge=0)
    # The step down the path, in flow time (the paper's 0.01).
    step_size: float = Field(default=0.01, gt=0, lt=1)
    # Decay of the averaged student per step of the student.
    ema_decay: float = Field(default=0.99, ge=0, lt=1)
    # Flow times of the twin trajectory and of the rectification: sigmoid(N(mean, std)).
    time_mean: float = 0.0
    time_std: float = Field(default=1.2, gt=0)


class TwinFlow(Loss):
    """The three terms of TwinFlow for a student with signed time.

    Args:
        config: its settings.
        trained: the trained part of the student.
        target: a copy of the student, without gradient, whose trained part is `target_trained`.
    """

    Config = TwinFlowConfig

    def __init__(
        self,
        config: TwinFlowConfig,
        trained: nn.Module,
        target: FlowModel,
        target_trained: nn.Module,
    ) -> None:
        self.config = config
        self.trained = trained
        self.target = target
        self.kept = {"averaged_student": target_trained.requires_grad_(False)}
        self._averaged_at = -1

    @classmethod
    def make(cls, distillation: Distillation, section: Section | None) -> Self | None:
        """With a copy of the run's student as target."""
        if not isinstance(section, TwinFlowConfig):
            return None
        models = distillation.models
        target, trained = copy.deepcopy((models.student, models.trained))
        return cls(section, models.trained, target, trained)

    def student(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The weighted sum of the terms."""
        self._average(batch.step)
        velocity = batch.velocity(batch.models.student)
        loss = self._consistency(batch, velocity)
        metrics = {"twinflow_consistency_loss": loss.item()}
        if self.config.adversarial_weight:
            fake = batch.fake.detach()
            flow_t = self.draw_times(fake)
            adversarial = twin_loss(velocity, fake, torch.randn_like(fake), flow_t)
            loss = loss + self.config.adversarial_weight * adversarial
            metrics["twinflow_adversarial_loss"] = adversarial.item()
        weight = self.config.rectification_weight * warmed_up(batch.step, self.config.warmup_steps)
        if weight:
            fake = batch.fake
            flow_t = self.draw_times(fake)
            with torch.no_grad():
                move = rectification(fake, torch.randn_like(fake), flow_t, batch.teacher, velocity)
            rectified = (fake - (fake + move).detach()).square().flatten(1).mean(1).mean()
            loss = loss + weight * rectified
            metrics["twinflow_rectification_loss"] = rectified.item()
        return self.config.weight * loss, metrics

    def draw_times(self, like: Tensor) -> Tensor:
        """Flow times (B,) of the twin trajectory and of the rectification."""
        times = logit_normal_times(len(like), mean=self.config.time_mean, std=self.config.time_std)
        return times.to(like.device)

    def _consistency(self, batch: Batch, velocity: Velocity) -> Tensor:
        u0 = batch.u0
        flow_t = trig_to_flow(batch.draw_times())
        s = expand_like(flow_t, u0)
        x = (1 - s) * u0 + s * torch.randn_like(u0)
        found = velocity(x, flow_t).float()
        with torch.no_grad():
            target = batch.velocity(self.target)
            error = consistency_error(
                found, x, flow_t, batch.teacher(x, flow_t).float(), target, self.config.step_size
            )
        return (found - (found - error).detach()).square().flatten(1).mean(1).mean()

    @torch.no_grad()
    def _average(self, step: int) -> None:
        """Moves the target towards the student, once per step, however many parts the step has."""
        if step == self._averaged_at:
            return
        self._averaged_at = step
        weight = averaging_weight(self.config.ema_decay, step)
        averaged = self.kept["averaged_student"].parameters()
        for average, live in zip(averaged, self.trained.parameters(), strict=True):
            average.lerp_(live, weight)


def consistency_error(
    found: Tensor, x: Tensor, flow_t: Tensor, path: Tensor, target: Velocity, step_size: float
) -> Tensor:
    """The change of the clean prediction per flow time along the path, clamped to [-1, 1]: (B,C,H,W), no gradient.

    The paper's base loss with one integration step to time 0 (RCGM): with d = min(step_size, s) and x' = x - d v_path,
    ((x' - (s - d) v_target(x', s - d)) - (x - s v)) / d. It vanishes where v is that of a consistency function; at s <= step_size
    it is v - v_path, flow matching.

    Args:
        found: the student's velocity v at (x, s).
        path: the velocity of the path that is to be consistent, such as the guided teacher's.
        target: the averaged student.
    """
    step = flow_t.clamp(max=step_size)
    d, s = expand_like(step, x), expand_like(flow_t, x)
    lower = x - d * path
    rest = flow_t - step
    end = lower - expand_like(rest, x) * target(lower, rest).float()
    return ((end - (x - s * found.detach())) / d).clamp(-1, 1)


def twin_loss(student: Velocity, fake: Tensor, noise: Tensor, flow_t: Tensor) -> Tensor:
    """Flow matching of the student's pictures (B,C,H,W) at negative time: the paper's self-adversarial loss."""
    return flow_loss(lambda x, s: student(x, -s), fake, noise, flow_t).mean()


def rectification(
    fake: Tensor, noise: Tensor, flow_t: Tensor, teacher: Velocity, student: Velocity
) -> Tensor:
    """The move of the pictures that the rectification loss asks for: (B,C,H,W).

    The velocity of the student's flow at negative time less that of the data, at the noised pictures. Both point from data to
    noise, so the difference points from the student's pictures to the data.
    """
    s = expand_like(flow_t, fake)
    x = (1 - s) * fake + s * noise
    return student(x, -flow_t).float() - teacher(x, flow_t).float()
