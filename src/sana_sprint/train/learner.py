"""One optimisation step at a time, and everything that a checkpoint must hold of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from sana_sprint.train import distributed
from sana_sprint.train.config import AnyRun, OptimizerConfig
from sana_sprint.train.optim import clip, make_optimizers, rate, set_rate
from sana_sprint.train.stage import Metrics, Part, Stage
from sana_sprint.train.state import EMA

Result = TypeVar("Result")
MAX_BAD_STEPS = 20  # non-finite steps in a row after which the run stops


class Player:
    """A module that learns, with its own optimisers."""

    def __init__(self, module: nn.Module, config: OptimizerConfig) -> None:
        self.module = module
        self.config = config
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizers = make_optimizers(module, config)
        self.base_rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]

    def update(self, multiplier: float) -> None:
        """Moves the parameters along their gradients, at the base rates times `multiplier`."""
        set_rate(self.optimizers, self.base_rates, multiplier)
        for optimizer in self.optimizers:
            optimizer.step()

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "module": self.module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes up what `state` returned."""
        self.module.load_state_dict(state["module"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


class Learner:
    """The stage's players, their optimisers, the first one's moving average, and the count of bad steps."""

    def __init__(self, stage: Stage, config: AnyRun) -> None:
        self.stage = stage
        self.config = config
        self.players = {
            name: Player(module, optimizer)
            for (name, module), optimizer in zip(stage.players.items(), config.optimizers, strict=True)
        }
        self.first = next(iter(self.players))
        self.ema = EMA(self.players[self.first].module, config.optimizer.ema_decay)
        self.skipped_steps = 0
        self.bad_steps = 0  # in a row

    def step(self, step: int) -> Metrics:
        """One update of the step's player; where its loss or gradient is not finite, nothing changes but the counters."""
        name = self.stage.player(step)
        player = self.players[name]
        loss, metrics = self._gradients(step)
        distributed.average_gradients(player.parameters)
        grad_norm, loss = clip(player.parameters, player.config.clip_norm), distributed.average(loss)
        if math.isfinite(grad_norm) and math.isfinite(loss):
            player.update(rate(step, self.config.schedule.steps, player.config))
            if name == self.first:
                self.ema.update(player.module, step)
            self.bad_steps = 0
        else:
            self._skip(step)
        for each in self.players.values():  # one player's loss may reach another's parameters
            each.module.zero_grad(set_to_none=True)
        prefix = "" if name == self.first else f"{name}_"
        return {f"{prefix}loss": loss, f"{prefix}grad_norm": grad_norm, **metrics}

    def averaged(self, action: Callable[[], Result]) -> Result:
        """Runs an action with the moving average in the first player's place, without gradients."""
        module = self.players[self.first].module
        self.ema.swap(module)
        module.eval()
        try:
            with torch.no_grad():
                return action()
        finally:
            module.train()
            self.ema.swap(module)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "players": {name: player.state() for name, player in self.players.items()},
            "ema": self.ema.weights,
            "skipped_steps": self.skipped_steps,
            "bad_steps": self.bad_steps,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes up what `state` returned."""
        for name, player in self.players.items():
            player.load_state(state["players"][name])
        self.ema.load(state["ema"])
        self.skipped_steps, self.bad_steps = state["skipped_steps"], state["bad_steps"]

    def _gradients(self, step: int) -> tuple[float, Metrics]:
        """Runs this process's parts of the step; returns their mean loss and metrics."""
        count = self.config.schedule.accumulation
        total, sums = 0.0, dict[str, float]()
        for number, part in own_parts(step, self.config):
            torch.manual_seed((self.config.seed * 1_000_003 + step) * 1_009 + number)
            loss, metrics = self.stage.loss(part)
            (loss / count).backward()  # type: ignore[no-untyped-call]  # torch has no annotation for it
            total += loss.item() / count
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + value / count
        return total, sums

    def _skip(self, step: int) -> None:
        self.skipped_steps += 1
        self.bad_steps += 1
        if self.bad_steps >= MAX_BAD_STEPS:
            raise RuntimeError(f"{self.bad_steps} steps in a row were not finite, the last at step {step}")


def own_parts(step: int, config: AnyRun) -> Iterator[tuple[int, Part]]:
    """This process's parts of a step, each with its number among all processes' parts.

    Part k of n takes samples k, k + n, k + 2n, ... of the step's batch, so what a step computes depends on n alone, not
    on how many processes share it.

    Raises:
        ValueError: the batch cannot be cut into equal parts.
    """
    batch_size, accumulation = config.schedule.batch_size, config.schedule.accumulation
    count = distributed.world_size() * accumulation
    if batch_size % count:
        raise ValueError(
            f"schedule.batch_size must be divisible by processes x schedule.accumulation = {count}; got {batch_size}"
        )
    for number in range(distributed.rank() * accumulation, (distributed.rank() + 1) * accumulation):
        yield number, Part(step, range(step * batch_size + number, (step + 1) * batch_size, count))
