"""The training loop, the same for every stage.

A stage knows its modules, its loss and how to show and export itself; the loop owns optimisation, the moving
average, logging, checkpoints and resuming. Every step seeds torch from (seed, step, process), so a run that was
stopped and resumed equals one that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sana_sprint.train import distributed
from sana_sprint.train.config import AnyRun
from sana_sprint.train.optim import clip, make_optimizers, rate, set_rate
from sana_sprint.train.state import EMA, flat_parameters, load_latest, save_checkpoint

Result = TypeVar("Result")
Metrics = dict[str, float]
Report = Callable[[str], None]  # receives a line about every milestone
MAX_BAD_STEPS = 20  # non-finite steps in a row after which the run stops


def autocast(config: AnyRun) -> torch.autocast:
    """The run's precision, as a context: bf16 products over fp32 weights, or fp32 throughout."""
    return torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16")


class Stage(Protocol):
    """What the loop needs of a stage."""

    @property
    def module(self) -> nn.Module:
        """Everything that learns."""

    def loss(self, step: int) -> tuple[Tensor, Metrics]:
        """The loss of the step's batch, and what to log."""

    def validate(self, folder: Path, step: int) -> Metrics:
        """Writes sample pictures into the folder and returns measurements; runs with averaged weights."""

    def export(self, folder: Path) -> None:
        """Writes the finished model folder; runs with averaged weights."""


def run(stage: Stage, config: AnyRun, *, report: Report) -> None:
    """Trains the stage to its last step, continuing from the newest checkpoint in the output folder.

    Args:
        stage: what to train.
        config: its run; `config.output` receives checkpoints, `log.jsonl`, sample grids and `final/`.
        report: receives a line about every milestone, in the first process only.

    Raises:
        RuntimeError: the loss or gradient was not finite `MAX_BAD_STEPS` steps in a row.
    """
    schedule, is_main = config.schedule, distributed.rank() == 0
    learner = _Learner(stage, config)
    if is_main:
        config.output.mkdir(parents=True, exist_ok=True)
        (config.output / "config.json").write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    first_step = learner.resume(config.output)
    if first_step and is_main:
        report(f"resuming at step {first_step}")

    started = time.monotonic()
    progress = tqdm(total=schedule.steps, initial=first_step, desc=config.stage, disable=not is_main)
    for step in range(first_step, schedule.steps):
        metrics = learner.step(step)
        progress.update()
        done = step + 1
        is_last = done == schedule.steps
        if not is_main:
            continue
        if done % schedule.log_every == 0 or is_last:
            speed = (done - first_step) * schedule.batch_size / (time.monotonic() - started)
            _log(config.output, {"step": done, **metrics, "samples_per_s": round(speed, 2)})
            progress.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
        if done % schedule.save_every == 0 or is_last:
            save_checkpoint(config.output, done, learner.state())
        if done % schedule.sample_every == 0 or is_last:
            measured = learner.averaged(partial(stage.validate, config.output / "samples", done))
            _log(config.output, {"step": done, **measured})
            report(f"step {done}: " + ", ".join(f"{name} {value:.4g}" for name, value in measured.items()))
    progress.close()
    if is_main:
        learner.averaged(lambda: stage.export(config.output / "final"))
        report(f"finished: {config.output / 'final'}")
    distributed.barrier()


class _Learner:
    """One optimisation step at a time, and everything a checkpoint must hold."""

    def __init__(self, stage: Stage, config: AnyRun) -> None:
        self.stage = stage
        self.config = config
        self.module = stage.module
        self.parameters = flat_parameters(self.module)
        self.optimizers = make_optimizers(self.module, config.optimizer)
        self.base_rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.ema = EMA(self.module, config.optimizer.ema_decay)
        self.bad_steps = 0

    def step(self, step: int) -> Metrics:
        """One update; a step whose loss or gradient is not finite changes nothing and is counted."""
        config = self.config
        torch.manual_seed((config.seed * 1_000_003 + step) * 1_009 + distributed.rank())
        set_rate(self.optimizers, self.base_rates, rate(step, config.schedule.steps, config.optimizer))
        loss, metrics = self.stage.loss(step)
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation for it
        distributed.average_gradients(self.parameters)
        grad_norm, value = clip(self.parameters, config.optimizer.clip_norm), distributed.average(loss.item())
        if math.isfinite(grad_norm) and math.isfinite(value):
            for optimizer in self.optimizers:
                optimizer.step()
            self.ema.update(self.module, step)
            self.bad_steps = 0
        else:
            self.bad_steps += 1
            if self.bad_steps >= MAX_BAD_STEPS:
                raise RuntimeError(
                    f"{self.bad_steps} steps in a row were not finite, the last at step {step}"
                )
        self.module.zero_grad(set_to_none=True)
        return {"loss": value, "grad_norm": grad_norm, **metrics}

    def averaged(self, action: Callable[[], Result]) -> Result:
        """Runs an action with the moving average in the module's place, without gradients."""
        self.ema.swap(self.module)
        self.module.eval()
        try:
            with torch.no_grad():
                return action()
        finally:
            self.module.train()
            self.ema.swap(self.module)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "module": self.module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "ema": self.ema.weights,
        }

    def resume(self, folder: Path) -> int:
        """Takes up the newest checkpoint; returns the number of steps done, 0 without one."""
        checkpoint = load_latest(folder)
        if checkpoint is None:
            return 0
        self.module.load_state_dict(checkpoint["module"])
        for optimizer, state in zip(self.optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.ema.weights = checkpoint["ema"]
        return int(checkpoint["step"])


def _log(folder: Path, entry: Metrics) -> None:
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
