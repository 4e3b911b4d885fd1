"""The training loop, the same for every stage.

A stage knows its modules, its loss and how to show and export itself; the loop owns optimisation, the moving
average, logging, checkpoints and resuming. Every step seeds torch from (seed, step), so a run that was stopped
and resumed equals one that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sana_sprint.train import distributed
from sana_sprint.train.config import AnyRun
from sana_sprint.train.optim import clip, make_optimizers, rate, set_rate
from sana_sprint.train.state import EMA, flat_parameters, load_latest, save_checkpoint

Metrics = dict[str, float]
Report = Callable[[str], None]  # receives a line about every milestone
MAX_BAD_STEPS = 20  # non-finite steps in a row after which the run stops


class Stage(Protocol):
    """What the loop needs of a stage. `module` holds everything that learns."""

    module: nn.Module

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
        report: receives a line about every milestone.

    Raises:
        RuntimeError: the loss or gradient was not finite `MAX_BAD_STEPS` steps in a row.
    """
    schedule, module = config.schedule, stage.module
    is_main = distributed.rank() == 0
    if is_main:
        config.output.mkdir(parents=True, exist_ok=True)
        (config.output / "config.json").write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    optimizers = make_optimizers(module, config.optimizer)
    base_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    ema = EMA(module, config.optimizer.ema_decay)
    parameters = flat_parameters(module)
    step = _resume(config.output, module, optimizers, ema, report)
    bad_steps = 0
    started, first_step = time.monotonic(), step
    progress = tqdm(total=schedule.steps, initial=step, desc=config.stage, dynamic_ncols=True, disable=not is_main)
    while step < schedule.steps:
        torch.manual_seed((config.seed * 1_000_003 + step) * 1_009 + distributed.rank())
        set_rate(optimizers, base_rates, rate(step, schedule.steps, config.optimizer))
        loss, metrics = stage.loss(step)
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation for it
        distributed.average_gradients(parameters)
        grad_norm, value = clip(parameters, config.optimizer.clip_norm), distributed.average(loss.item())
        if math.isfinite(grad_norm) and math.isfinite(value):
            for optimizer in optimizers:
                optimizer.step()
            ema.update(module, step)
            bad_steps = 0
        else:
            bad_steps += 1
            if bad_steps >= MAX_BAD_STEPS:
                raise RuntimeError(f"{bad_steps} steps in a row were not finite, the last at step {step}")
        module.zero_grad(set_to_none=True)
        step += 1
        progress.update()
        if not is_main:
            continue
        if step % schedule.log_every == 0:
            speed = (step - first_step) * schedule.batch_size / (time.monotonic() - started)
            entry = {"step": step, "loss": value, "grad_norm": grad_norm, "samples_per_s": round(speed, 2), **metrics}
            _log(config.output, entry)
            progress.set_postfix(loss=f"{value:.4f}", refresh=False)
        if step % schedule.save_every == 0 or step == schedule.steps:
            save_checkpoint(config.output, step, _state(module, optimizers, ema))
        if step % schedule.sample_every == 0 or step == schedule.steps:
            _validate(stage, ema, config.output, step, report)
    progress.close()
    if is_main:
        ema.swap(module)
        stage.export(config.output / "final")
        report(f"finished: {config.output / 'final'}")
    distributed.barrier()


def _validate(stage: Stage, ema: EMA, output: Path, step: int, report: Report) -> None:
    ema.swap(stage.module)
    stage.module.eval()
    with torch.no_grad():
        metrics = stage.validate(output / "samples", step)
    stage.module.train()
    ema.swap(stage.module)
    _log(output, {"step": step, **metrics})
    report(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))


def _state(module: nn.Module, optimizers: list[torch.optim.Optimizer], ema: EMA) -> dict[str, object]:
    return {
        "module": module.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "ema": ema.weights,
    }


def _resume(
    folder: Path,
    module: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    ema: EMA,
    report: Report,
) -> int:
    checkpoint = load_latest(folder)
    if checkpoint is None:
        return 0
    module.load_state_dict(checkpoint["module"])
    for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    ema.weights = checkpoint["ema"]
    report(f"resuming at step {checkpoint['step']}")
    return int(checkpoint["step"])


def _log(folder: Path, entry: dict[str, float]) -> None:
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
