"""One optimisation step at a time, and everything that a checkpoint must hold of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from sana_sprint.train import distributed
from sana_sprint.train.config import AnyRun
from sana_sprint.train.data.sampler import own_parts
from sana_sprint.train.ema import EMA, load_optimizer_states, optimizer_states
from sana_sprint.train.optim.optimizers import clip, make_optimizers, rate, set_rate
from sana_sprint.train.sections import OptimizerConfig
from sana_sprint.train.stages.base import Metrics, Stage

Result = TypeVar("Result")
MAX_BAD_STEPS = 20  # non-finite steps in a row after which the run stops


class Trainee:
    """A module that learns, and the optimisers of those of its parameters that are this process's own.

    `owner` is None where every process keeps all states, else it names each parameter's process.
    """

    def __init__(self, module: nn.Module, config: OptimizerConfig, *, is_shared_out: bool) -> None:
        self.module = module
        self.config = config
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.owner = distributed.owners(self.parameters) if is_shared_out else None
        self.own = {
            name: p
            for name, p in self.parameters.items()
            if self.owner is None or self.owner[name] == distributed.rank()
        }
        self.optimizers = make_optimizers(list(self.own.items()), config)
        self.base_rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]

    def update(self, multiplier: float) -> None:
        """Moves the parameters along their gradients, at the base rates times `multiplier`."""
        set_rate(self.optimizers, self.base_rates, multiplier)
        for optimizer in self.optimizers:
            optimizer.step()
        self.share()

    def share(self) -> None:
        """Broadcasts every parameter from the process that updated it."""
        if self.owner is not None:
            distributed.share(self.parameters, self.owner)

    def whole(self, states: Mapping[str, Any]) -> Mapping[str, Any]:
        """The states of all parameters, in the first process, from those of each process's own."""
        return states if self.owner is None else distributed.collect(states)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "module": self.module.state_dict(),
            "optimizer": self.whole(optimizer_states(self.optimizers, self.own)),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores `state()`."""
        self.module.load_state_dict(state["module"])
        load_optimizer_states(self.optimizers, self.own, state["optimizer"])


class Trainer:
    """The stage's players, the first one's moving average, and the count of bad steps."""

    def __init__(self, stage: Stage, config: AnyRun) -> None:
        self.stage = stage
        self.config = config
        self.players = {
            name: Trainee(module, optimizer, is_shared_out=config.distribution == "shard")
            for (name, module), optimizer in zip(stage.players.items(), config.optimizers, strict=True)
        }
        self.first = next(iter(self.players.values()))
        self.ema = EMA(self.first.own, config.ema_decay)
        self.skipped_steps = 0
        self.bad_steps = 0  # in a row

    def step(self, step: int) -> Metrics:
        """One update of the step's player; where its loss or gradient is not finite, only the counters change.

        Raises:
            RuntimeError: that happened `MAX_BAD_STEPS` times in a row.
        """
        name = self.stage.player(step)
        player = self.players[name]
        loss, metrics = self._gradients(step)
        parameters = list(player.parameters.values())
        distributed.average_gradients(parameters)
        grad_norm, loss = clip(parameters, player.config.clip_norm), distributed.average(loss)
        if math.isfinite(grad_norm) and math.isfinite(loss):
            player.update(rate(step, self.config.schedule.steps, player.config))
            if player is self.first:
                self.ema.update(step)
            self.bad_steps = 0
        else:
            self._skip(step)
        for each in self.players.values():  # one player's loss may reach another's parameters
            each.module.zero_grad(set_to_none=True)
        prefix = "" if player is self.first else f"{name}_"
        return {f"{prefix}loss": loss, f"{prefix}grad_norm": grad_norm, **metrics}

    def averaged(self, action: Callable[[], Result]) -> Result | None:
        """Runs an action in the first process, with the moving average in the first player's place, without gradients.

        Every process must call this; the others return None.
        """
        self._swap()
        self.first.module.eval()
        try:
            with torch.no_grad():
                return action() if distributed.rank() == 0 else None
        finally:
            self.first.module.train()
            self._swap()

    def state(self) -> dict[str, Any]:
        """For a checkpoint. Every process must call this; what the first one gets is whole."""
        return {
            "players": {name: player.state() for name, player in self.players.items()},
            "ema": self.first.whole(self.ema.weights),
            "kept": {name: module.state_dict() for name, module in self.stage.kept.items()},
            "skipped_steps": self.skipped_steps,
            "bad_steps": self.bad_steps,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores `state()`, in any number of processes."""
        for name, player in self.players.items():
            player.load_state(state["players"][name])
        self.ema.load(state["ema"])
        for name, module in self.stage.kept.items():
            module.load_state_dict(state["kept"][name])
        self.skipped_steps, self.bad_steps = state["skipped_steps"], state["bad_steps"]

    def _gradients(self, step: int) -> tuple[float, Metrics]:
        """Runs this process's parts of the step; returns their mean loss and mean metrics."""
        losses, found = [], dict[str, list[float]]()
        buffers = [buffer for player in self.players.values() for buffer in player.module.buffers()]
        before = [buffer.clone() for buffer in buffers]
        for number, part in own_parts(step, self.config.schedule):
            # Each part finds the buffers (spectral norms' vectors, say) as it would in a process of its own.
            for buffer, original in zip(buffers, before, strict=True):
                buffer.copy_(original)
            torch.manual_seed((self.config.seed * 1_000_003 + step) * 1_009 + number)
            loss, metrics = self.stage.loss(part)
            (loss / self.config.schedule.accumulation).backward()  # type: ignore[no-untyped-call]  # torch has no annotation for it
            losses.append(loss.item())
            for name, value in metrics.items():
                found.setdefault(name, []).append(value)
        means = {name: sum(values) / len(values) for name, values in found.items()}
        return sum(losses) / len(losses), means

    def _skip(self, step: int) -> None:
        self.skipped_steps += 1
        self.bad_steps += 1
        if self.bad_steps >= MAX_BAD_STEPS:
            raise RuntimeError(f"{self.bad_steps} steps in a row were not finite, the last at step {step}")

    def _swap(self) -> None:
        self.ema.swap()
        self.first.share()
