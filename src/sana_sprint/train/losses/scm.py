"""The continuous-time consistency loss (sCM) in unit space.

Algorithm 2 and equations of section 3.2 (arXiv 2503.09641), with everything divided by sigma_d: u = x_t/sigma_d, and
the teacher's velocity dx_t/dt / sigma_d is its network output F. The tangent's normalisation constant c = 0.1 then
becomes c/sigma_d, and g below equals the paper's normalised g.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from sana_sprint.train.losses.base import Loss
from sana_sprint.train.losses.tangent import Tangent, make_tangent
from sana_sprint.train.metrics import Metrics, by_level
from sana_sprint.train.optim.optimizers import warmed_up
from sana_sprint.train.sections import Section
from sana_sprint.trigflow import (
    SIGMA_DATA,
    Denoiser,
    add_noise,
    expand_like,
    flow_denoiser,
    prior_weight,
    trig_to_flow,
)

if TYPE_CHECKING:
    from sana_sprint.train.distillation import Batch, Distillation

TANGENT_CONSTANT = 0.1  # c of the tangent's normalisation, in the paper's space


class SCM(Loss):
    """The consistency loss of a student whose dF/dt is computed by `tangent`, with weight `weight`.

    `warmup_steps`: steps, of all players, over which the tangent's weight r grows from 0 to 1.
    """

    def __init__(self, weight: float, tangent: Tangent, warmup_steps: int) -> None:
        self.weight = weight
        self.tangent = tangent
        self.warmup_steps = warmup_steps

    @classmethod
    def make(cls, distillation: Distillation, section: Section | None) -> Self | None:
        """From the run's fields `scm_weight`, `tangent` and `tangent_warmup_steps`."""
        config = distillation.config
        if not config.scm_weight:
            return None
        return cls(config.scm_weight, make_tangent(config.tangent), config.tangent_warmup_steps)

    def student(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The weighted loss at angles of its own."""
        u0, guidance, context = batch.u0, batch.guidance, batch.context
        t = batch.draw_times()
        u = add_noise(u0, torch.randn_like(u0), t)
        with torch.no_grad():
            teacher_F = flow_denoiser(batch.teacher)(u, t).float()
            tangent = self.tangent(batch.models.student, context, u, t, teacher_F, guidance)
        F = batch.student(u, t).float()
        warmup = warmed_up(batch.step, self.warmup_steps)
        g = consistency_target(F.detach(), teacher_F, tangent, u, t, tangent_weight=warmup)
        loss, metrics = scm_loss(F, g, t, batch.log_variance(t))
        metrics["tangent_norm"] = tangent.flatten(1).norm(dim=1).mean().item()
        directions = direction_norm(g)
        metrics["direction_norm"] = directions.mean().item()
        metrics |= by_level("direction_norm", directions, trig_to_flow(t))
        return self.weight * loss, metrics


def scaled_tangent(student: Denoiser, u: Tensor, t: Tensor, teacher_F: Tensor) -> Tensor:
    """F' = cos(t) sin(t) dF/dt along the teacher's trajectory: (B,C,H,W), no gradient.

    The factor goes into the tangents rather than onto the result (the paper's JVP rearrangement): near t = pi/2,
    dF/dt is huge and the product is not.
    """
    factor = torch.cos(t) * torch.sin(t)
    with torch.no_grad():
        # [1]: the tangent; the primal is the output, which the caller gets from its own forward pass
        tangent: Tensor = torch.func.jvp(student, (u, t), (expand_like(factor, u) * teacher_F, factor))[1]
    return tangent.float()


def consistency_target(
    F: Tensor, teacher_F: Tensor, tangent: Tensor, u: Tensor, t: Tensor, *, tangent_weight: float
) -> Tensor:
    """The normalised g, by which the student's output should move: (B,C,H,W).

    g = -cos^2(t) (F - F_teacher) - r (cos(t) sin(t) u + F'), then g / (||g|| + c) over each sample.

    Args:
        F: the student's output, detached.
        teacher_F: the guided teacher's output at the same (u,t).
        tangent: F' of `scaled_tangent`.
        tangent_weight: r, which warms up from 0 to 1.
    """
    angle = expand_like(t, u)
    cos, sin = torch.cos(angle), torch.sin(angle)
    g = -(cos**2) * (F - teacher_F) - tangent_weight * (cos * sin * u + tangent)
    norm = g.flatten(1).norm(dim=1)
    return g / (expand_like(norm, g) + TANGENT_CONSTANT / SIGMA_DATA)


def scm_loss(F: Tensor, g: Tensor, t: Tensor, logvar: Tensor) -> tuple[Tensor, dict[str, float]]:
    """mean over elements of w(t)/e^logvar (F - F_detached - g)^2 + logvar, with the prior weight w = 1/(sigma_d tan t).

    Args:
        F: the student's output with gradient (B,C,H,W).
        g: `consistency_target`.
        logvar: learnt log variance of the loss at each sample's condition, (B,).
    """
    error = (F - F.detach() - g).square().flatten(1).mean(1)
    loss = (prior_weight(t) * torch.exp(-logvar) * error + logvar).mean()
    return loss, {"logvar": logvar.detach().mean().item()}


def direction_norm(g: Tensor) -> Tensor:
    """The norm that each sample's direction had before `consistency_target` normalised it: (B,).

    The loss itself cannot tell how far the student is from consistent, because its target has a norm near 1 always.
    """
    norm = g.flatten(1).double().norm(dim=1)
    before: Tensor = norm / (1 - norm) * (TANGENT_CONSTANT / SIGMA_DATA)
    return before.float()
