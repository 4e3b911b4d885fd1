"""Times and samplers: from noise to a clean latent in a few network evaluations. Pure functions.

Everything lives in unit space, u = x_t/sigma_d (see `trigflow`). Times are TrigFlow angles as plain floats: a strictly
decreasing list that ends in 0.0 and has one entry more than there are steps.

A sampler is a function of a denoiser, a start and times. It hands the denoiser the number of the step, so that a
condition that depends on the step (such as a ControlNet that is on in some of them) need not count calls: `heun` makes two in
a step.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from sana_sprint.stopping import Interrupt, ShouldStop, stop_if
from sana_sprint.trigflow import T_MAX, Denoiser, add_noise, expand_like, to_clean

MAX_STEPS = 10_000  # a list of times is made of any number up to it
# SANA-Sprint table 7: the times found by search, one after the other, for both published sizes.
T_FIRST = 1.5683  # arctan(200/sigma_d), for 2 and 4 steps
PRESETS: dict[int, tuple[float, ...]] = {
    1: (T_MAX, 0.0),
    2: (T_FIRST, 1.3, 0.0),
    4: (T_FIRST, 1.3, 1.1, 0.6, 0.0),
}


class DefaultTime(float):
    """A time that nobody gave: a number like any other, but it gives way where a given one would be an error."""


# Defaults of the published pipeline. The first one is pi/2 rounded up, hence the largest time allowed.
PUBLISHED_MAX = DefaultTime(1.57080)
PUBLISHED_INTERMEDIATE = DefaultTime(1.3)
PUBLISHED_GUIDANCE = 4.5  # the guidance scale that the published pipeline uses by default


# ----- times ----------------------------------------------------------------------------------------------------------


def schedule(
    num_steps: int,
    *,
    max_timesteps: float | None = None,
    intermediate_timesteps: float | None = PUBLISHED_INTERMEDIATE,
    timesteps: Sequence[float] | Tensor | None = None,
) -> list[float]:
    """Times for any number of steps from 1 up.

    By default 1, 2 and 4 steps have the paper's times (table 7). Other numbers read the 4-step curve, whose points lie at 0,
    1/4, 2/4, 3/4 and 1, at k/num_steps by linear interpolation. docs/math.md has a table of all cases.

    Args:
        num_steps: network evaluations; not used when `timesteps` is given.
        max_timesteps: the first time, in (0, 1.5708]; None for the paper's. The other default times stay where they are if
            they are below it; otherwise all shrink in proportion.
        intermediate_timesteps: the middle time of two steps, below the first one. None, for any number of steps: equal
            distances from `max_timesteps` to 0, as published.
        timesteps: all times instead of the other arguments: strictly decreasing, in [0, 1.5708]. A final 0 may be left out.

    Raises:
        ValueError: naming the value and the allowed ones; also for an `intermediate_timesteps` that was given for another
            number of steps than 2, and for either of the two times along with `timesteps`.
    """
    if timesteps is not None:
        for name, value in (
            ("max_timesteps", max_timesteps),
            ("intermediate_timesteps", intermediate_timesteps),
        ):
            if value is not None and not isinstance(value, DefaultTime):
                raise ValueError(f"{name} cannot be given along with timesteps, got: {value!r}")
        return _custom_times(timesteps)
    num_steps = _check_num_steps(num_steps)
    if intermediate_timesteps is None:
        return _even_times(num_steps, max_timesteps)
    times = _preset_times(num_steps)
    if max_timesteps is not None:
        t_max = _check_time("max_timesteps", max_timesteps)
        if times[1] < t_max:
            times[0] = t_max
        else:
            times = [t * (t_max / times[0]) for t in times]
    if not isinstance(intermediate_timesteps, DefaultTime):
        times[1] = _check_intermediate(intermediate_timesteps, num_steps, times[0])
    return times


def _even_times(num_steps: int, max_timesteps: float | None) -> list[float]:
    if max_timesteps is None:
        raise ValueError("max_timesteps and intermediate_timesteps cannot both be None: give the first time")
    t_max = _check_time("max_timesteps", max_timesteps)
    return [t_max * (num_steps - k) / num_steps for k in range(num_steps + 1)]


def _check_intermediate(value: float, num_steps: int, first: float) -> float:
    if num_steps != 2:
        raise ValueError(
            f"intermediate_timesteps is for 2 steps, not for {num_steps}: leave it out (the paper's times) or pass None "
            f"(equal distances); got: {value!r}"
        )
    t = _check_time("intermediate_timesteps", value)
    if t >= first:
        raise ValueError(f"intermediate_timesteps must be below the first time, {first:g}; got: {t:g}")
    return t


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


# ----- samplers -------------------------------------------------------------------------------------------------------

# (u (B,C,H,W) fp32, t (B,) fp32, number of the step from 0) -> F (B,C,H,W) in TrigFlow units
StepDenoiser = Callable[[Tensor, Tensor, int], Tensor]
# (step, its time, the sample after it) -> a sample to continue with instead, or None; may raise `Interrupt`
OnStep = Callable[[int, float, Tensor], Tensor | None]
# (the clean estimate u0 (B,C,H,W) of a step, the step) -> the estimate to use instead
Constrain = Callable[[Tensor, int], Tensor]


class Sampler(Protocol):
    """The signature of the samplers below."""

    def __call__(
        self,
        denoiser: StepDenoiser,
        u: Tensor,
        times: Sequence[float],
        *,
        draw_noise: Callable[[], Tensor],
        constrain: Constrain | None = None,
        on_step: OnStep | None = None,
        should_stop: ShouldStop | None = None,
    ) -> Tensor:
        """Returns the clean u0 (B,C,H,W).

        denoiser: (u, t, step) -> F. u: the start (B,C,H,W) fp32 at `times[0]`, such as unit Gaussian noise at pi/2.
        times: from `schedule`, or any falling list; a last time above 0 leaves the result noised to it.
        draw_noise: fresh unit Gaussian noise shaped like `u`; the deterministic samplers never call it.
        constrain: replaces each step's clean estimate, such as by known pixels outside a mask.
        on_step: called after each step with u at the next time (after the last step: the result).
        should_stop: asked before each network evaluation. Raises Stopped if it returns True.
        """
        ...


def at_any_step(denoiser: Denoiser) -> StepDenoiser:
    """Adapts a denoiser that does not depend on the step."""
    return lambda u, t, step: denoiser(u, t)


def consistency(
    denoiser: StepDenoiser,
    u: Tensor,
    times: Sequence[float],
    *,
    draw_noise: Callable[[], Tensor],
    constrain: Constrain | None = None,
    on_step: OnStep | None = None,
    should_stop: ShouldStop | None = None,
) -> Tensor:
    """Multi-step consistency sampling: maps u to the clean latent, noises it to the next time, and so on. See `Sampler`.

    `draw_noise` is called once between two steps, never after the last.
    """

    def step(u: Tensor, t: float, t_next: float, i: int) -> tuple[Tensor, Tensor]:
        angle = angles(t, u)
        clean = to_clean(u, denoiser(u, angle, i), angle)
        if constrain is not None:
            clean = constrain(clean, i)
        return clean if t_next <= 0 else add_noise(clean, draw_noise(), angles(t_next, u)), clean

    return _iterate(step, u, times, on_step, should_stop)


def euler(
    denoiser: StepDenoiser,
    u: Tensor,
    times: Sequence[float],
    *,
    draw_noise: Callable[[], Tensor],
    constrain: Constrain | None = None,
    on_step: OnStep | None = None,
    should_stop: ShouldStop | None = None,
) -> Tensor:
    """First-order integration of du/dt = F, for flow teachers: one evaluation per step, no noise. See `Sampler`.

    Rotates u towards the clean estimate, u' = cos(t') u0 + sin(t') noise (DDIM in TrigFlow), exact where u0 and noise are
    constant along the path.
    """

    def step(u: Tensor, t: float, t_next: float, i: int) -> tuple[Tensor, Tensor]:
        clean, noise = _split(denoiser, u, t, i, constrain)
        return add_noise(clean, noise, angles(t_next, u)), clean

    return _iterate(step, u, times, on_step, should_stop)


def heun(
    denoiser: StepDenoiser,
    u: Tensor,
    times: Sequence[float],
    *,
    draw_noise: Callable[[], Tensor],
    constrain: Constrain | None = None,
    on_step: OnStep | None = None,
    should_stop: ShouldStop | None = None,
) -> Tensor:
    """Second-order integration of du/dt = F: two evaluations per step, one in a last step to 0. See `Sampler`.

    With h = t - t', the step of `euler` implies F' = sin(h) u + cos(h) F at its end; half of h times the difference to the
    network's F there is the correction.
    """

    def step(u: Tensor, t: float, t_next: float, i: int) -> tuple[Tensor, Tensor]:
        clean, noise = _split(denoiser, u, t, i, constrain)
        end = angles(t_next, u)
        predicted = add_noise(clean, noise, end)
        if t_next <= 0:
            return predicted, clean
        stop_if(should_stop)
        found = _velocity(*_split(denoiser, predicted, t_next, i, constrain), end)
        return predicted - (t - t_next) / 2 * (found - _velocity(clean, noise, end)), clean

    return _iterate(step, u, times, on_step, should_stop)


def _iterate(
    step: Callable[[Tensor, float, float, int], tuple[Tensor, Tensor]],
    u: Tensor,
    times: Sequence[float],
    on_step: OnStep | None,
    should_stop: ShouldStop | None,
) -> Tensor:
    """The last sample. A step gives the next one and the clean estimate, which is the last one at time 0 and on `Interrupt`.

    As published, replacing the sample after the step to time 0 has no effect.
    """
    for i, (t, t_next) in enumerate(pairwise(times)):
        stop_if(should_stop)
        u, clean = step(u, t, t_next, i)
        try:
            changed = None if on_step is None else on_step(i, t, u)
        except Interrupt:
            return clean
        if t_next <= 0:
            return clean
        u = u if changed is None else changed
    return u


def _split(
    denoiser: StepDenoiser, u: Tensor, t: float, i: int, constrain: Constrain | None
) -> tuple[Tensor, Tensor]:
    """Splits u = cos(t) clean + sin(t) noise by the network; a constrained estimate changes the noise with it."""
    angle = angles(t, u)
    F = denoiser(u, angle, i)
    clean = to_clean(u, F, angle)
    cos, sin = torch.cos(expand_like(angle, u)), torch.sin(expand_like(angle, u))
    if constrain is None:
        return clean, sin * u + cos * F
    clean = constrain(clean, i)
    return clean, (u - cos * clean) / sin


def _velocity(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """F = cos(t) noise - sin(t) clean."""
    angle = expand_like(t, clean)
    return torch.cos(angle) * noise - torch.sin(angle) * clean


def angles(t: float, u: Tensor) -> Tensor:
    """The time as a tensor (B,) fp32 on the device of u (B,...)."""
    return torch.full((u.shape[0],), t, dtype=torch.float32, device=u.device)
