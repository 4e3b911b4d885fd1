"""Starts of a call: pure noise, a picture noised to an angle, and a picture of which a part is kept.

Everything is in unit space and fp32, as in `sampling`. A start is u at the first time, the times from there to 0 and, where a
part of the picture is known, a constraint on every step's clean estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sana_sprint.sampling import Constrain, angles
from sana_sprint.trigflow import add_noise


@dataclass(frozen=True)
class Start:
    """The sample u (B,C,h,w) at `times[0]`, the times, and the constraint of the sampler, if any."""

    u: Tensor
    times: tuple[float, ...]
    constrain: Constrain | None = None


# (unit noise (B,C,h,w), times of a whole call) -> start
MakeStart = Callable[[Tensor, Sequence[float]], Start]


def from_noise(noise: Tensor, times: Sequence[float]) -> Start:
    """Starts from unit Gaussian noise (B,C,h,w)."""
    return Start(noise, tuple(times))


def from_image(clean: Tensor, noise: Tensor, times: Sequence[float], strength: float) -> Start:
    """Starts from a picture's latent (B,C,h,w) of unit variance, noised.

    All times are multiplied by `strength`, so that the first angle grows continuously from 0 (the latent as it is, no step)
    to `times[0]` for any number of steps. At strength 1 the start is `from_noise`, bit for bit.

    Raises:
        ValueError: for a strength outside [0, 1].
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be from 0 (keep the picture) to 1 (ignore it), got: {strength}")
    if strength == 1:
        return from_noise(noise, times)
    if strength == 0:
        return Start(clean, (0.0,))
    shortened = tuple(strength * t for t in times)
    return Start(add_noise(clean, noise, angles(shortened[0], clean)), shortened)


def from_image_and_mask(
    clean: Tensor, mask: Tensor, noise: Tensor, times: Sequence[float], strength: float = 1.0
) -> Start:
    """Starts from a picture's latent (B,C,h,w) of which only a part is drawn (Consistency Models, arXiv 2303.01469, alg. 4).

    Every step's clean estimate is replaced by the picture's where `mask` is 0. The sampler then noises both parts to the next
    time with the step's own noise, so the known part is always distributed as the network expects it. What is drawn follows
    the known part more closely the more steps there are (docs/math.md).

    Args:
        mask: (B or 1,1,h,w) in [0,1], fp32: 1 where the picture is drawn; values between blend the estimates.

    Raises:
        ValueError: for a strength outside [0, 1], or a mask of another shape.
    """
    batch, _, height, width = clean.shape
    if mask.shape not in ((1, 1, height, width), (batch, 1, height, width)):
        raise ValueError(
            f"the mask must be (1 or {batch},1,{height},{width}) as the latent, got: {tuple(mask.shape)}"
        )

    def constrain(estimate: Tensor, step: int) -> Tensor:
        # lerp at a weight of 0 or 1 rounds, so both are chosen.
        blended = torch.where(mask == 1, estimate, torch.lerp(clean, estimate, mask))
        return torch.where(mask == 0, clean, blended)

    start = from_image(clean, noise, times, strength)
    # The known part is known in the first step too, even where strength 1 starts from noise alone.
    known = clean if start.times[0] == 0 else add_noise(clean, noise, angles(start.times[0], clean))
    return Start(torch.where(mask == 0, known, start.u), start.times, constrain)
