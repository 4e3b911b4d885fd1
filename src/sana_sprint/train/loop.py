"""The training loop, the same for every stage.

A stage knows what learns, the loss of each part of a step, and how to show and export itself; the loop owns
optimisation, the moving average, logging, checkpoints and resuming. Torch is seeded before every part from
(seed, step, part), so a run that was stopped and resumed equals one that was not.
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

from tqdm import tqdm

from sana_sprint.train import distributed
from sana_sprint.train.config import AnyRun
from sana_sprint.train.learner import Learner
from sana_sprint.train.stage import Metrics, Part, Report, Stage, autocast
from sana_sprint.train.state import load_latest, save_checkpoint

__all__ = ["Metrics", "Part", "Report", "Stage", "autocast", "run"]


def run(stage: Stage, config: AnyRun, *, report: Report) -> None:
    """Trains the stage to its last step, continuing from the newest checkpoint in the output folder.

    Args:
        stage: what to train.
        config: its run; `config.output` receives checkpoints, `log.jsonl`, sample grids and `final/`.
        report: receives a line about every milestone, in the first process only.

    Raises:
        RuntimeError: the loss or gradient was not finite too many steps in a row.
    """
    schedule, is_main = config.schedule, distributed.rank() == 0
    learner = Learner(stage, config)
    if is_main:
        config.output.mkdir(parents=True, exist_ok=True)
        (config.output / "config.json").write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    first_step = 0
    if checkpoint := load_latest(config.output):
        learner.load_state(checkpoint["learner"])
        first_step = int(checkpoint["step"])
        if is_main:
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
        if done % schedule.save_every == 0 or is_last:
            save_checkpoint(config.output, done, {"learner": learner.state()})
        if done % schedule.sample_every == 0 or is_last:
            measured = learner.averaged(partial(stage.validate, config.output / "samples", done))
            _log(config.output, {"step": done, **measured})
            report(f"step {done}: " + ", ".join(f"{name} {value:.4g}" for name, value in measured.items()))
    progress.close()
    if is_main:
        learner.averaged(lambda: stage.export(config.output / "final"))
        report(f"finished: {config.output / 'final'}")
    distributed.barrier()


def _log(folder: Path, entry: Metrics) -> None:
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
