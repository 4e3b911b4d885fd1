"""The published scheduler's interface, for sampling loops written by hand, and its file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from sana_sprint.config import Config
from sana_sprint.noise import draw_noise
from sana_sprint.sampling import PUBLISHED_INTERMEDIATE, PUBLISHED_MAX, angles, schedule
from sana_sprint.trigflow import SIGMA_DATA, add_noise, to_clean


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig(Config):
    """Fields of the published scheduler_config.json. Only `sigma_data` changes results."""

    title: ClassVar[str] = "scheduler"

    num_train_timesteps: int = 1000
    prediction_type: str = "trigflow"
    sigma_data: float = SIGMA_DATA

    def __post_init__(self) -> None:
        if self.prediction_type != "trigflow":
            raise ValueError(f"prediction_type must be 'trigflow', got: {self.prediction_type!r}")
        if not (math.isfinite(self.sigma_data) and self.sigma_data > 0):
            raise ValueError(f"sigma_data must be above 0, got: {self.sigma_data}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """As of any config, of a scheduler_config.json; raises ValueError also for a file of another class, naming it."""
        if (name := values.get("_class_name", "SCMScheduler")) != "SCMScheduler":
            raise ValueError(f"the scheduler must be a SCMScheduler, this is the config of a {name}")
        return super().from_dict(values)


class SCMSchedulerOutput(NamedTuple):
    """prev_sample: at the next time, the next step's input. pred_original_sample: the clean sample implied now."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class SCMScheduler:
    """The published scheduler's interface, for loops written by hand; the pipelines use `schedule` and `sample`.

    Samples and model outputs are in data space here, as published: sigma_data times unit space. Differences: any
    number of steps works with the default arguments; and `step` finds its place by `timestep` alone, so steps may be
    repeated or skipped.
    """

    config_name = "scheduler_config.json"
    init_noise_sigma = 1.0  # the published constant; the initial noise is scaled by sigma_data, not by this
    order = 1  # network evaluations per step

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
        self.begin_index: int | None = None
        self._times: list[float] = []

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @classmethod
    def from_config(cls, config: SchedulerConfig | Mapping[str, Any], **changes: Any) -> SCMScheduler:
        """A scheduler with these settings, some of them changed. Raises ValueError as `SchedulerConfig.from_dict` does."""
        values = config.to_dict() if isinstance(config, SchedulerConfig) else config
        return cls(**SchedulerConfig.from_dict({**values, **changes}).to_dict())

    @classmethod
    def taken_from(cls, scheduler: Any) -> SCMScheduler:
        """A scheduler as it is, or one with the config of another library's object of this name.

        Raises:
            ValueError: for an object of another class, naming it, and for a config that `from_config` refuses.
        """
        if isinstance(scheduler, cls):
            return scheduler
        found = type(scheduler).__name__
        if found != cls.__name__:
            raise ValueError(f"the scheduler must be an {cls.__name__}, got: {found}")
        return cls.from_config(dict(scheduler.config))

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

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Only kept as `begin_index`: `step` finds its place by the time it is given."""
        self.begin_index = begin_index

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """The place of a time among those to step from. Raises ValueError for a time that is none of them."""
        return self._times.index(self._times_at(timestep)[0])

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
            generator: where the fresh noise comes from, see `noise.draw_noise`. As published it draws after the last step
                too, where noise has no effect, so that several loops may share a generator.
            return_dict: False for a plain tuple.

        Raises:
            ValueError: if `set_timesteps` was not called, or `timestep` is none of its times.
        """
        t, t_next = self._times_at(timestep)
        clean = to_clean(sample, model_output, angles(t, sample))
        noise = draw_noise(clean.shape, generator, device=clean.device) * self.config.sigma_data
        previous = add_noise(clean, noise, angles(t_next, clean)) if t_next > 0 else clean
        return SCMSchedulerOutput(previous, clean) if return_dict else (previous, clean)

    def _times_at(self, timestep: float | Tensor) -> tuple[float, float]:
        t = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        for own, following in pairwise(self._times):
            # A time that went through an fp32 tensor is rounded; its neighbours are far away.
            if math.isclose(t, own, rel_tol=1e-6):
                return own, following
        allowed = ", ".join(f"{own:g}" for own in self._times[:-1]) or "none, call set_timesteps first"
        raise ValueError(f"timestep must be one of the times to step from ({allowed}), got: {t:g}")
