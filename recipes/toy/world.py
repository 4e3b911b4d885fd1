"""Data in the plane whose flow is known exactly: a ring of Gaussians, of variance 1 along each axis.

The velocity of flow matching is a posterior mean in closed form, so the teacher makes no error of its own, and the
consistency function is the end of its path, found by integrating the path to high accuracy.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from sana_sprint.trigflow import Denoiser, flow_denoiser

NUM_SPOTS = 5
SPOT_STD = 0.3
RADIUS = math.sqrt(
    2 * (1 - SPOT_STD**2)
)  # along an axis, the ring adds radius^2/2 to the spots' own variance
_ANGLES = 0.3 + 2 * math.pi / NUM_SPOTS * torch.arange(NUM_SPOTS, dtype=torch.float64)
SPOTS = RADIUS * torch.stack([_ANGLES.cos(), _ANGLES.sin()], dim=1)  # their means, (5,2) fp64


def draw(count: int) -> Tensor:
    """Samples of the data, (count,2) fp32, from torch's global generator."""
    return SPOTS.float()[torch.randint(NUM_SPOTS, (count,))] + SPOT_STD * torch.randn(count, 2)


def velocity(x: Tensor, s: Tensor) -> Tensor:
    """E[z - x0 | x] for x = (1-s) x0 + s z: what flow matching would learn, (B,2) for x (B,2) and s (B,).

    Given its spot of mean m and variance a, x is Gaussian with mean (1-s) m and variance q = (1-s)^2 a + s^2, so that
    E[x0 | x, spot] = m + (1-s) a (x - (1-s) m)/q and E[z | x, spot] = s (x - (1-s) m)/q. The spots are weighed by
    their posterior probability.
    """
    s = s[:, None]
    variance = (1 - s) ** 2 * SPOT_STD**2 + s**2
    offset = x[:, None] - (1 - s)[:, None] * SPOTS.to(x)  # (B,5,2)
    posterior = torch.softmax(-offset.square().sum(2) / (2 * variance), dim=1)
    slope = (s - (1 - s) * SPOT_STD**2) / variance
    return (posterior[:, :, None] * (slope[:, None] * offset - SPOTS.to(x))).sum(1)


teacher: Denoiser = flow_denoiser(velocity)


def follow(denoiser: Denoiser, u: Tensor, t: Tensor, *, num_steps: int = 100) -> list[Tensor]:
    """The path du/dt = F(u,t) from angle t (B,) down to 0, by fourth-order Runge-Kutta: num_steps + 1 points (B,2)."""
    path = [u]
    fractions = torch.linspace(1, 0, num_steps + 1, dtype=t.dtype)
    for start, end in itertools.pairwise(t * fraction for fraction in fractions):
        middle, h = (start + end) / 2, (end - start)[:, None]
        k1 = denoiser(u, start)
        k2 = denoiser(u + h / 2 * k1, middle)
        k3 = denoiser(u + h / 2 * k2, middle)
        k4 = denoiser(u + h * k3, end)
        u = u + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        path.append(u)
    return path


def exact(u: Tensor, t: Tensor) -> Tensor:
    """The consistency function f(u,t): the clean point at the end of the teacher's path, (B,2) of u's dtype."""
    return follow(teacher, u.double(), t.double())[-1].to(u)
