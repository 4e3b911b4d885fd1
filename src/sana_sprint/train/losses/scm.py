"""The losses of SANA-Sprint: continuous-time consistency (sCM) in unit space, and adversarial (LADD). Pure functions.

Algorithm 2 and equations of section 3.2 (arXiv 2503.09641), with everything divided by sigma_d: u = x_t/sigma_d, and
the teacher's velocity dx_t/dt / sigma_d is its network output F. The tangent's normalisation constant c = 0.1 then
becomes c/sigma_d, and g below equals the paper's normalised g.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sana_sprint.models.layers import autocast_off
from sana_sprint.trigflow import SIGMA_DATA, Denoiser, expand_like

TANGENT_CONSTANT = 0.1  # c of the tangent's normalisation, in the paper's space


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


def prior_weight(t: Tensor) -> Tensor:
    """w(t) = 1/(sigma_d tan t), the fixed part of the loss's weight: (B,)."""
    return 1 / (SIGMA_DATA * torch.tan(t))


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
