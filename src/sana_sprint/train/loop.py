"""The training loop, the same for every stage.

A stage knows what learns, the loss of each part of a step, and how to show and export itself; the loop owns
optimisation, the moving average, logging, checkpoints and resuming. Torch is seeded before every part from
(seed, step, part), so a run that was stopped and resumed equals one that was not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial

from sana_sprint.train import distributed
from sana_sprint.train.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from sana_sprint.train.config import AnyRun
from sana_sprint.train.logging import RunLog
from sana_sprint.train.stages.base import Report, Stage
from sana_sprint.train.trainer import Trainer


def run(
    stage: Stage, config: AnyRun, *, report: Report, should_stop: Callable[[], bool] = lambda: False
) -> bool:
    """Trains the stage to its last step, from where `config.resume` says.

    Args:
        stage: what to train.
        config: its run; `config.output` receives checkpoints, `log.jsonl`, sample grids and `final/`.
        report: receives a line about every milestone, in the first process only.
        should_stop: asked after every step, in every process; one that says yes makes the run save and end.

    Returns:
        True when the last step was done and the model exported; False when it was stopped before.

    Raises:
        ValueError: the batch cannot be divided, or the checkpoint to resume is missing, another run's, or
            of other data.
        ImportError: the run asks for a package that is not installed.
        RuntimeError: the loss or gradient was not finite too many steps in a row.
    """
    trainer = Trainer(stage, config)
    first_step = _resume(trainer, config, stage.data, report)
    if distributed.rank() == 0:
        config.output.mkdir(parents=True, exist_ok=True)
        (config.output / "config.json").write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    with closing(RunLog(config, first_step)) as log:
        is_finished = _train(stage, config, trainer, log, first_step, report, should_stop)
    if is_finished:
        trainer.averaged(partial(stage.export, config.output / "final"))
        if distributed.rank() == 0:
            report(f"finished: {config.output / 'final'}")
    # A process that left its group while another is still saving would take that one down.
    distributed.barrier()
    return is_finished


def _train(
    stage: Stage,
    config: AnyRun,
    trainer: Trainer,
    log: RunLog,
    step: int,
    report: Report,
    should_stop: Callable[[], bool],
) -> bool:
    """All steps from `step` on, with what is due after each; False if stopped."""
    schedule = config.schedule

    def validate() -> None:
        measured = trainer.averaged(partial(stage.validate, config.output / "samples", step))
        if measured is not None:
            log.write(step, measured)
            report(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in measured.items()))

    if step == 0:
        validate()
    while step < schedule.steps:
        started = time.monotonic()
        metrics = trainer.step(step)
        log.add(metrics, time.monotonic() - started)
        step += 1
        is_last = step == schedule.steps
        is_stopping = distributed.average(should_stop()) > 0 and not is_last
        if is_last or step % schedule.log_every == 0:
            log.write_averages(step, {"skipped_steps": trainer.skipped_steps})
        if is_last or is_stopping or step % schedule.save_every == 0:
            _save(trainer, config, step, stage.data)
        if is_stopping:
            if distributed.rank() == 0:
                report(f"stopped at step {step}, and saved")
            return False
        if is_last or step % schedule.sample_every == 0:
            validate()
    return True


def _resume(trainer: Trainer, config: AnyRun, data: Mapping[str, str], report: Report) -> int:
    """Loads the checkpoint that the config asks for; returns the number of steps done."""
    path = find_checkpoint(config)
    if path is None:
        return 0
    checkpoint = load_checkpoint(path, config, data)
    trainer.load_state(checkpoint["trainer"])
    step = int(checkpoint["step"])
    if distributed.rank() == 0:
        report(f"resuming at step {step}")
    return step


def _save(trainer: Trainer, config: AnyRun, step: int, data: Mapping[str, str]) -> None:
    state = trainer.state()
    if distributed.rank() == 0:
        save_checkpoint(config, step, state, data)
