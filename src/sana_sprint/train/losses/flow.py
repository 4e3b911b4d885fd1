"""Flow matching, the teacher's side: its loss, classifier-free guidance and its sampler. Pure functions.

x_s = (1-s) x_0 + s z with s from 0 (data) to 1 (noise); the network predicts v = z - x_0.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from sana_sprint.trigflow import Velocity, expand_like


def logit_normal_times(count: int, *, mean: float, std: float) -> Tensor:
    """Training times sigmoid(N(mean, std^2)): (count,) fp32 in (0,1). SD3's density (arXiv 2403.03206, sec. 3.1)."""
    return torch.sigmoid(mean + std * torch.randn(count))


def flow_loss(velocity: Velocity, u0: Tensor, noise: Tensor, flow_t: Tensor) -> Tensor:
    """Mean squared error of the predicted velocity, per sample: (B,)."""
    s = expand_like(flow_t, u0)
    predicted = velocity((1 - s) * u0 + s * noise, flow_t)
    return nn.functional.mse_loss(predicted.float(), noise - u0, reduction="none").flatten(1).mean(1)


def guided(
    conditional: Velocity,
    unconditional: Velocity,
    scale: float | Tensor,
    *,
    projected: bool = False,
    limit: float = math.inf,
    start: float = 0.0,
) -> Velocity:
    """Guidance by the difference between the model with and without its caption.

    Plain, it is classifier-free guidance, v_unc + scale (v_cond - v_unc). Projected, it is adaptive projected guidance
    (arXiv 2410.02416) without momentum: the part of the difference that is parallel to the clean prediction
    only saturates the picture, and is left out. At little noise guidance mostly breaks details (arXiv 2404.07724).

    Args:
        conditional: the model with the caption.
        unconditional: the model without.
        scale: one number, or one for each sample (B,); 1 is the conditional model alone.
        projected: leave the parallel part out.
        limit: greatest RMS of the difference between clean predictions; a greater one is scaled down to it. Projected only.
        start: flow time up to which nothing is guided.
    """

    def velocity(x: Tensor, flow_t: Tensor) -> Tensor:
        v = conditional(x, flow_t)
        is_guided = flow_t > start
        if start and not is_guided.any():  # half of the work
            return v
        base = unconditional(x, flow_t)
        weight = expand_like(torch.where(is_guided, scale, 1.0), v)
        if not projected:
            return base + weight * (v - base)
        # Clean predictions are x - s v, so their difference is -s times that of the velocities.
        s = expand_like(flow_t, v)
        return v + (weight - 1) * _without_parallel(v - base, x - s * v, limit / s)

    return velocity


def _without_parallel(difference: Tensor, direction: Tensor, limit: Tensor) -> Tensor:
    """The part of each sample's difference that is orthogonal to a direction, its RMS at most `limit` (B,1,1,1)."""
    unit = nn.functional.normalize(direction.flatten(1)).view_as(direction)
    parallel = (difference * unit).flatten(1).sum(1)
    rest = difference - expand_like(parallel, unit) * unit
    rms = expand_like(rest.flatten(1).square().mean(1).sqrt(), rest)
    return rest * (limit / rms.clamp_min(torch.finfo(rms.dtype).tiny)).clamp_max(1)


def sample_flow(velocity: Velocity, noise: Tensor, *, num_steps: int = 20, shift: float = 1.0) -> Tensor:
    """Integrates the flow from noise (B,C,H,W) to data with Euler steps.

    Times are even in [1, 0], then shifted by s -> shift s / (1 + (shift - 1) s), which spends more steps on noise.
    """
    even = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    times = (shift * even / (1 + (shift - 1) * even)).tolist()
    x = noise
    for s, s_next in itertools.pairwise(times):
        v = velocity(x, torch.full((len(x),), s, device=x.device))
        x = x + (s_next - s) * v.float()
    return x
