"""From noise to a clean latent in a few steps: times, and the loop.

Everything lives in unit space, u = x_t/sigma_d (see `trigflow`). Times are TrigFlow angles as plain floats: a strictly
decreasing list that ends in 0.0 and has one entry more than there are steps.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sana_sprint.trigflow import T_MAX, Denoiser, add_noise, to_clean

# SANA-Sprint table 7: the times found by search, one after the other, for both published sizes.
MAX_STEPS = 10_000  # a list of times is made of any number up to it
T_FIRST = 1.5683  # arctan(200/sigma_d), for 2 and 4 steps
PRESETS: dict[int, tuple[float, ...]] = {
    1: (T_MAX, 0.0),
    2: (T_FIRST, 1.3, 0.0),
    4: (T_FIRST, 1.3, 1.1, 0.6, 0.0),
}
PUBLISHED_MAX = 1.57080  # the published pipeline's default; pi/2 rounded up, hence the largest time allowed
PUBLISHED_INTERMEDIATE = 1.3


# ----- times ----------------------------------------------------------------------------------------------------------


def schedule(
    num_steps: int,
    *,
    max_timesteps: float | None = None,
    intermediate_timesteps: float | None = None,
    timesteps: Sequence[float] | Tensor | None = None,
) -> list[float]:
    """Times for any number of steps from 1 up.

    1, 2 and 4 steps have the paper's times (table 7). Other numbers read the 4-step curve, whose points lie at 0, 1/4,
    2/4, 3/4 and 1, at k/num_steps by linear interpolation.

    Args:
        num_steps: network evaluations; not used when `timesteps` is given.
        max_timesteps: the first time, in (0, 1.5708]. The other times stay where they are if they are below it;
            otherwise all shrink in proportion.
        intermediate_timesteps: the middle time when there are two steps, below the first one. Not used for any other
            number of steps.
        timesteps: all times instead: strictly decreasing, in [0, 1.5708]. A final 0 may be left out.

    Raises:
        ValueError: naming the value and what is allowed.
    """
    if timesteps is not None:
        return _custom_times(timesteps)
    num_steps = _check_num_steps(num_steps)
    times = _preset_times(num_steps)
    if max_timesteps is not None:
        t_max = _check_time("max_timesteps", max_timesteps)
        if times[1] < t_max:
            times[0] = t_max
        else:
            times = [t * (t_max / times[0]) for t in times]
    if num_steps == 2 and intermediate_timesteps is not None:
        times[1] = _check_time("intermediate_timesteps", intermediate_timesteps)
        if times[1] >= times[0]:
            raise ValueError(
                f"intermediate_timesteps must be below the first time, {times[0]:g}; got: {times[1]:g}"
            )
    return times


def _preset_times(num_steps: int) -> list[float]:
    if num_steps in PRESETS:
        return list(PRESETS[num_steps])
    curve, intervals = PRESETS[4], len(PRESETS[4]) - 1
    times = []
    for k in range(num_steps):
        i, part = divmod(k * intervals, num_steps)
        times.append(curve[i] + (curve[i + 1] - curve[i]) * part / num_steps)
    return [*times, 0.0]


def _check_num_steps(num_steps: int) -> int:
    try:
        count = operator.index(num_steps)
    except TypeError:
        raise ValueError(f"the number of steps must be a whole number, got: {num_steps!r}") from None
    if not 1 <= count <= MAX_STEPS:
        raise ValueError(f"the number of steps must be from 1 to {MAX_STEPS}, got: {count}")
    return count


def _check_time(name: str, value: float) -> float:
    t = _as_float(name, value)
    if not 0 < t <= PUBLISHED_MAX:
        raise ValueError(
            f"{name} must be above 0 (clean) and at most {PUBLISHED_MAX:g} (pure noise), got: {value}"
        )
    return t


def _custom_times(timesteps: Sequence[float] | Tensor) -> list[float]:
    times = [_as_float("timesteps", t) for t in timesteps]
    if not times or times[-1] != 0.0:
        times.append(0.0)
    if len(times) < 2:
        raise ValueError(f"timesteps must hold at least one time above 0, got: {list(timesteps)}")
    falls = all(t > t_next for t, t_next in pairwise(times))  # false for NaN too
    if not falls or times[0] > PUBLISHED_MAX:
        raise ValueError(
            f"timesteps must fall from at most {PUBLISHED_MAX:g} to 0, each below the one before; got: {times}"
        )
    return times


def _as_float(name: str, value: float) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, got: {value!r}") from None


# ----- the loop -------------------------------------------------------------------------------------------------------

# (step index, its time, the sample after it) -> a sample to go on with instead, or None
OnStep = Callable[[int, float, Tensor], Tensor | None]


def sample(
    denoiser: Denoiser,
    noise: Tensor,
    times: Sequence[float],
    *,
    draw_noise: Callable[[], Tensor],
    on_step: OnStep | None = None,
) -> Tensor:
    """Consistency sampling: jump to the clean latent, noise it again to the next time, jump again.

    Args:
        denoiser: (u (B,C,H,W) fp32, t (B,) fp32) -> F in TrigFlow units.
        noise: unit Gaussian (B,C,H,W) fp32: u at `times[0]`.
        times: from `schedule`, or any falling list; a last time above 0 leaves the result noised to it.
        draw_noise: fresh noise like `noise`; called once between two steps, never after the last.
        on_step: called after each step with u at the next time (after the last step: the result).

    Returns:
        Clean u0 (B,C,H,W).
    """
    u = noise
    for i, (t, t_next) in enumerate(pairwise(times)):
        angle = angles(t, u)
        u = to_clean(u, denoiser(u, angle), angle)
        if t_next > 0:
            u = add_noise(u, draw_noise(), angles(t_next, u))
        changed = None if on_step is None else on_step(i, t, u)
        u = u if changed is None else changed
    return u


def angles(t: float, u: Tensor) -> Tensor:
    return torch.full((u.shape[0],), t, dtype=torch.float32, device=u.device)
