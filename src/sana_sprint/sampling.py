"""From noise to a clean latent in a few steps: times, the loop, and the published scheduler for hand-written loops.

Everything but `SCMScheduler` lives in unit space, u = x_t/sigma_d (see `trigflow`). Times are TrigFlow angles as plain
floats: a strictly decreasing list that ends in 0.0 and has one entry more than there are steps.
"""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sana_sprint.numerics import draw_noise
from sana_sprint.trigflow import SIGMA_DATA, T_MAX, Denoiser, add_noise, to_clean

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
        angle = _angles(t, u)
        u = to_clean(u, denoiser(u, angle), angle)
        if t_next > 0:
            u = add_noise(u, draw_noise(), _angles(t_next, u))
        changed = None if on_step is None else on_step(i, t, u)
        u = u if changed is None else changed
    return u


def _angles(t: float, u: Tensor) -> Tensor:
    return torch.full((u.shape[0],), t, dtype=torch.float32, device=u.device)


# ----- the published scheduler ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Fields of the published scheduler_config.json. Only `sigma_data` changes what is computed."""

    num_train_timesteps: int = 1000
    prediction_type: str = "trigflow"
    sigma_data: float = SIGMA_DATA

    def __post_init__(self) -> None:
        if self.prediction_type != "trigflow":
            raise ValueError(f"prediction_type must be 'trigflow', got: {self.prediction_type!r}")
        if not (math.isfinite(self.sigma_data) and self.sigma_data > 0):
            raise ValueError(f"sigma_data must be above 0, got: {self.sigma_data}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SchedulerConfig:
        """Config from the content of a scheduler_config.json; keys starting with `_` are notes and dropped.

        Raises ValueError listing the keys that are not fields, or naming the class that the file is for.
        """
        if (name := values.get("_class_name", "SCMScheduler")) != "SCMScheduler":
            raise ValueError(f"the scheduler must be a SCMScheduler, this is the config of a {name}")
        kept = {key: value for key, value in values.items() if not key.startswith("_")}
        if unknown := sorted(kept.keys() - {field.name for field in fields(cls)}):
            raise ValueError(f"unknown fields in the scheduler config: {', '.join(unknown)}")
        return cls(**kept)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for scheduler_config.json."""
        return asdict(self)


class SCMSchedulerOutput(NamedTuple):
    """prev_sample: at the next time, the next step's input. pred_original_sample: the clean sample implied now."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class SCMScheduler:
    """The published scheduler's interface, for loops written by hand; the pipelines use `schedule` and `sample`.

    Samples and model outputs are in data space here, as published: sigma_data times unit space. Differences: any
    number of steps works with the default arguments; `step` knows its place from `timestep` alone, so steps may be
    repeated or skipped; and no noise is drawn after the last step.
    """

    config_name = "scheduler_config.json"
    init_noise_sigma = 1.0  # the published constant; the initial noise is scaled by sigma_data, not by this

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        prediction_type: str = "trigflow",
        sigma_data: float = SIGMA_DATA,
    ) -> None:
        self.config = SchedulerConfig(
            num_train_timesteps=num_train_timesteps, prediction_type=prediction_type, sigma_data=sigma_data
        )
        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0)  # until set_timesteps
        self._times: list[float] = []

    @classmethod
    def from_config(cls, config: SchedulerConfig | Mapping[str, Any]) -> SCMScheduler:
        """A scheduler with these settings. Raises ValueError as `SchedulerConfig.from_dict` does."""
        values = config.to_dict() if isinstance(config, SchedulerConfig) else config
        return cls(**SchedulerConfig.from_dict(values).to_dict())

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], *, subfolder: str | None = None) -> SCMScheduler:
        """Read scheduler_config.json from a folder on this machine.

        Raises ValueError if it is absent, not JSON, or the config of another scheduler.
        """
        path = Path(folder, subfolder or "", cls.config_name)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls.from_config(values)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"cannot load the scheduler from {path}: {error}") from error

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write scheduler_config.json into `folder`, made if absent."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        content = {"_class_name": "SCMScheduler", **self.config.to_dict()}
        path = Path(folder, self.config_name)
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        device: str | torch.device | None = None,
        max_timesteps: float | None = PUBLISHED_MAX,
        intermediate_timesteps: float | None = PUBLISHED_INTERMEDIATE,
    ) -> None:
        """Choose the times, as `schedule` does; `self.timesteps` holds them in fp32, the final 0 included.

        Raises:
            ValueError: for a bad value, or if both the number of steps and `timesteps` are missing.
        """
        if num_inference_steps is None and timesteps is None:
            raise ValueError("set_timesteps needs num_inference_steps or timesteps")
        self._times = schedule(
            num_inference_steps or 0,
            timesteps=timesteps,
            max_timesteps=max_timesteps,
            intermediate_timesteps=intermediate_timesteps,
        )
        self.num_inference_steps = len(self._times) - 1
        self.timesteps = torch.tensor(self._times, dtype=torch.float32, device=device)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SCMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step from `timestep` to the next time.

        Args:
            model_output: sigma_data * F (B,C,H,W), fp32.
            timestep: an entry of `self.timesteps` but the last; a batch of it is taken by its first.
            sample: x_t (B,C,H,W) in data space, fp32.
            generator: where the fresh noise comes from, see `numerics.draw_noise`.
            return_dict: False for a plain tuple.

        Raises:
            ValueError: if `set_timesteps` was not called, or `timestep` is none of its times.
        """
        t, t_next = self._times_at(timestep)
        clean = to_clean(sample, model_output, _angles(t, sample))
        previous = clean
        if t_next > 0:
            noise = draw_noise(clean.shape, generator, device=clean.device) * self.config.sigma_data
            previous = add_noise(clean, noise, _angles(t_next, clean))
        return SCMSchedulerOutput(previous, clean) if return_dict else (previous, clean)

    def _times_at(self, timestep: float | Tensor) -> tuple[float, float]:
        t = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        for own, following in pairwise(self._times):
            # A time that went through an fp32 tensor is rounded; its neighbours are far away.
            if math.isclose(t, own, rel_tol=1e-6):
                return own, following
        allowed = ", ".join(f"{own:g}" for own in self._times[:-1]) or "none, call set_timesteps first"
        raise ValueError(f"timestep must be one of the times to step from ({allowed}), got: {t:g}")
