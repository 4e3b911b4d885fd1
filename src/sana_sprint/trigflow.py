"""TrigFlow, and the exact change of variables between it and flow matching. Pure functions.

TrigFlow noises along a quarter circle, x_t = cos(t) x_0 + sin(t) z with z ~ N(0, sigma_d^2 I) and t from 0 (data)
to pi/2 (noise); its velocity field is dx_t/dt = sigma_d F(x_t/sigma_d, t). Everything here lives in unit space,
u = x_t/sigma_d, where data and noise both have variance 1 and sigma_d cancels. Equations are those of the
SANA-Sprint paper (arXiv 2503.09641), section 3.1 and Proposition 3.1.

Angles are fp32 or fp64 tensors of shape (B,): bf16 would move t = 1.3 by 0.003.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

SIGMA_DATA = 0.5  # standard deviation of the data x_0; enters only the time density and the loss weight
T_MAX = math.pi / 2

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (u (B,C,H,W), t (B,)) -> F (B,C,H,W)
Velocity = Callable[[Tensor, Tensor], Tensor]  # (x_flow (B,C,H,W), flow_t (B,)) -> v (B,C,H,W)


def expand_like(t: Tensor, u: Tensor) -> Tensor:
    """Shapes t (B,) as (B,1,1,1), to multiply u (B,C,H,W)."""
    return t.reshape(-1, *(1,) * (u.ndim - 1))


def trig_to_flow(t: Tensor) -> Tensor:
    """TrigFlow angle -> flow-matching time in [0,1] with the same signal-to-noise ratio (eq. 6)."""
    return torch.sin(t) / (torch.sin(t) + torch.cos(t))


def flow_to_trig(flow_t: Tensor) -> Tensor:
    """Inverse of `trig_to_flow`."""
    return torch.atan2(flow_t, 1 - flow_t)


def sigma_to_trig(sigma: Tensor) -> Tensor:
    """Noise-to-signal ratio sigma (as in EDM) -> angle: arctan(sigma/sigma_d)."""
    return torch.atan(sigma / SIGMA_DATA)


def add_noise(u0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Clean u0 and unit noise (B,C,H,W) -> u at angle t."""
    angle = expand_like(t, u0)
    return torch.cos(angle) * u0 + torch.sin(angle) * noise


def to_clean(u: Tensor, F: Tensor, t: Tensor) -> Tensor:
    """The consistency function f(u,t) = cos(t) u - sin(t) F: the clean u0 that network output F implies."""
    angle = expand_like(t, u)
    return torch.cos(angle) * u - torch.sin(angle) * F


def flow_denoiser(velocity: Velocity) -> Denoiser:
    """A flow-matching model as a TrigFlow model, without loss (eq. 7 and 8).

    Args:
        velocity: predicts v = noise - data from x_flow = (1-s) data + s noise at flow time s.

    Returns:
        denoiser(u, t) -> F. With c = 1/(cos t + sin t): v = velocity(c u, c sin t) and
        F = c ((cos t - sin t) u + v). Differentiable in u and t.
    """

    def denoiser(u: Tensor, t: Tensor) -> Tensor:
        angle = expand_like(t, u)
        cos, sin = torch.cos(angle), torch.sin(angle)
        c = 1 / (cos + sin)
        v = velocity(c * u, trig_to_flow(t))
        return c * ((cos - sin) * u + v)

    return denoiser


def lognormal_times(count: int, *, mean: float, std: float, device: torch.device | str = "cpu") -> Tensor:
    """`count` training angles arctan(e^tau/sigma_d) with tau ~ N(mean, std^2): (count,) fp32, from torch's global generator."""
    return sigma_to_trig(torch.exp(mean + std * torch.randn(count, device=device)))


def prior_weight(t: Tensor) -> Tensor:
    """w(t) = 1/(sigma_d tan t), the fixed part of the consistency loss's weight (section 3.2): (B,)."""
    return 1 / (SIGMA_DATA * torch.tan(t))
