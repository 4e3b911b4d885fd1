"""Distribution matching beside the consistency loss: pictures move to where the teacher finds them likelier than they are now.

The score distillation of DMD (arXiv 2311.18828), as a part of a consistency distillation rCM's (arXiv 2510.08431). SANA-Sprint has
no such loss. Consistency alone covers every picture that a caption allows and averages some of them; this loss is mode-seeking.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sana_sprint.train.config import MatchingConfig
from sana_sprint.train.losses.flow import flow_loss, logit_normal_times
from sana_sprint.train.optim.optimizers import warmed_up
from sana_sprint.train.stages.captions import FlowModel
from sana_sprint.trigflow import Velocity, expand_like


class Matching:
    """A flow model that follows what the student draws, beside the teacher that knows what it should.

    Args:
        config: its settings.
        follower: starts as the teacher, with guidance embedding: what the student draws depends on the scale.
        learning: what of the follower learns.
    """

    def __init__(self, config: MatchingConfig, follower: FlowModel, learning: nn.Module) -> None:
        self.config = config
        self.follower = follower
        self.learning = learning

    def student_loss(self, fake: Tensor, teacher: Velocity, follower: Velocity) -> Tensor:
        """Half the squared norm of `direction`, mean over samples; its gradient by the pictures is the direction.

        Args:
            fake: the student's pictures (B,C,H,W), with gradients.
            teacher: guided.
            follower: told the same.
        """
        with torch.no_grad():
            flow_t = self._times(fake)
            toward = direction(fake.float(), torch.randn_like(fake), flow_t, teacher, follower)
        moved = (fake - toward).detach()
        return (fake - moved).square().flatten(1).sum(1).mean() / 2

    def follower_loss(self, fake: Tensor, follower: Velocity) -> Tensor:
        """Flow matching on the student's pictures (B,C,H,W)."""
        return flow_loss(follower, fake, torch.randn_like(fake), self._times(fake)).mean()

    def weight(self, step: int) -> float:
        """The loss's factor at a step: it grows from 0 while the follower learns whom it follows."""
        return self.config.weight * warmed_up(step, self.config.warmup_steps)

    def _times(self, like: Tensor) -> Tensor:
        times = logit_normal_times(len(like), mean=self.config.time_mean, std=self.config.time_std)
        return times.to(like.device)


def direction(fake: Tensor, noise: Tensor, flow_t: Tensor, teacher: Velocity, follower: Velocity) -> Tensor:
    """Where to move pictures against: (follower's - teacher's clean prediction) / ||picture - teacher's||, (B,C,H,W).

    Equations 7 and 8 of DMD with the norm in place of the mean size: a direction has a norm of about 1, as the consistency
    loss's has. Both predict from the same noised pictures; at flow time s a clean prediction is x - s v.
    """
    s = expand_like(flow_t, fake)
    x = (1 - s) * fake + s * noise
    wanted = x - s * teacher(x, flow_t).float()
    found = x - s * follower(x, flow_t).float()
    distance = (fake - wanted).flatten(1).norm(dim=1).clamp_min(1e-3)
    return (found - wanted) / expand_like(distance, fake)
