"""Runs all stages of a chain in a given time, in one call or in several: `python -m recipes.emoji3d.chain 128 --minutes 660`.

Each stage has its share of the time. How many steps fit into it, a short probe measures on the machine at hand (after the
latents are cached); the plan is written down, so that a later call continues the same stage with the same number of
steps. What is finished, and the newest checkpoint of what is not, is copied into `--keep`.

    python -m recipes.emoji3d.chain 128 --minutes 660                                     # two cores
    python -m recipes.emoji3d.chain 256 --minutes 25 --store --stop-after 9 --keep "$OUT"   # a GPU, three calls
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes.emoji3d.store import store

SIDES = (128, 256)
# Stages in order, and each one's part of the time: detail is the autoencoder's, everything else the teacher's.
SHARES = {
    "autoencoder": 0.26,
    "teacher": 0.42,
    "student": 0.11,
    "matching": 0.08,
    "trajectories": 0.06,
    "control-teacher": 0.04,
    "control-student": 0.03,
}
_PROBE_STEPS = 30
_LEAST_STEPS = 100


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: its name, its recipe, its run's folder and its part of the whole time."""

    name: str
    recipe: Path
    output: Path
    share: float


def stages(side: int, runs: Path = Path("runs/emoji3d")) -> list[Stage]:
    """The stages of the chain for pictures of `side` pixels, in order.

    Raises:
        ValueError: there is no such chain.
    """
    if side not in SIDES:
        raise ValueError(f"side must be one of {SIDES}, got {side}")
    here = Path(__file__).parent
    return [
        Stage(name, here / f"{name}-{side}.toml", runs / str(side) / name, share)
        for name, share in SHARES.items()
    ]


def planned_steps(seconds: float, samples_per_second: float, batch_size: int) -> int:
    """How many steps fit into the seconds that are left, at least a hundred."""
    return max(_LEAST_STEPS, int(seconds * samples_per_second / batch_size))


def run(
    side: int,
    minutes: float,
    *,
    train: Callable[[Sequence[str], float], bool],
    stop_at: float,
    keep: Path | None = None,
) -> bool:
    """Runs what is not finished of the chain; returns whether all of it is.

    Args:
        side: of the pictures, in pixels.
        minutes: that all stages together may take.
        train: runs the training command with these arguments until a time (as `time.monotonic` has it); returns
            whether it finished.
        stop_at: when to stop, as `time.monotonic` has it.
        keep: a folder for what is finished or saved.
    """
    for stage in stages(side):
        if not (stage.output / "final").is_dir():
            steps = _plan(stage, minutes, train, stop_at)
            done = steps is not None and train([str(stage.recipe), f"schedule.steps={steps}"], stop_at)
            if keep is not None:
                _copy(stage, keep)
            if not done:
                return False
        elif keep is not None:
            _copy(stage, keep)
    return True


def _plan(
    stage: Stage, minutes: float, train: Callable[[Sequence[str], float], bool], stop_at: float
) -> int | None:
    """The stage's number of steps, from its plan or a probe; None if the time was over before that was known."""
    path = stage.output.with_name(f"{stage.name}-plan.json")
    if path.is_file():
        return int(json.loads(path.read_text(encoding="utf-8"))["steps"])
    started = time.monotonic()
    probe = stage.output.with_name(f"{stage.name}-probe")
    settings = [
        f'output="{probe}"',
        f"schedule.steps={_PROBE_STEPS}",
        f"schedule.log_every={_PROBE_STEPS // 2}",
    ]
    if not train([str(stage.recipe), *settings], stop_at):
        return None
    records = [json.loads(line) for line in (probe / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    speed = [record["samples_per_s"] for record in records if "samples_per_s" in record][-1]
    config = json.loads((probe / "config.json").read_text(encoding="utf-8"))
    left = 60 * minutes * stage.share - (time.monotonic() - started)
    steps = planned_steps(left, speed, config["schedule"]["batch_size"])
    path.write_text(json.dumps({"steps": steps, "samples_per_s": speed}), encoding="utf-8")
    shutil.rmtree(probe)
    return steps


def _copy(stage: Stage, keep: Path) -> None:
    """Copies the stage's plan and result, or its newest checkpoint, where they are not there already."""
    target = keep / stage.name
    plan = stage.output.with_name(f"{stage.name}-plan.json")
    target.mkdir(parents=True, exist_ok=True)
    if plan.is_file():
        shutil.copy(plan, keep / plan.name)
    if (stage.output / "final").is_dir():
        shutil.copytree(stage.output / "final", target / "final", dirs_exist_ok=True)
        return
    for checkpoint in sorted(stage.output.glob("checkpoint-*.pt"))[-1:]:
        shutil.copy(checkpoint, target / checkpoint.name)
    for folder in ("tokenizer",):  # a teacher's, which a resumed run reads back
        if (stage.output / folder).is_dir():
            shutil.copytree(stage.output / folder, target / folder, dirs_exist_ok=True)


def restore(side: int, kept: Path) -> None:
    """Puts what a `keep` folder holds back into the runs' folders."""
    for stage in stages(side):
        plan = kept / f"{stage.name}-plan.json"
        if plan.is_file():
            stage.output.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(plan, stage.output.parent / plan.name)
        if (kept / stage.name).is_dir():
            shutil.copytree(kept / stage.name, stage.output, dirs_exist_ok=True)


def train_until(arguments: Sequence[str], stop_at: float) -> bool:
    """Runs one training in a process of its own; at `stop_at` it is asked to save and end."""
    process = subprocess.Popen([sys.executable, "-m", "sana_sprint", "train", *arguments])
    try:
        return process.wait(timeout=max(1.0, stop_at - time.monotonic())) == 0
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        process.wait()
        return False


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("side", type=int, choices=SIDES, help="pixels of the pictures")
    parser.add_argument("--minutes", type=float, required=True, help="of all stages together")
    parser.add_argument("--stop-after", type=float, default=1e6, help="minutes after which this call ends")
    parser.add_argument("--keep", type=Path, help="folder for results and the newest checkpoints")
    parser.add_argument("--restore", type=Path, help="what an earlier call has kept, to go on from")
    parser.add_argument("--store", action="store_true", help="make the stored sets of the 256 px chain first")
    parser.add_argument("--samples", type=int, default=200_000, help="of each stored set")
    arguments = parser.parse_args()
    stop_at = time.monotonic() + 60 * arguments.stop_after
    if arguments.restore:
        restore(arguments.side, arguments.restore)
    if arguments.store:
        workers = max(1, len(os.sched_getaffinity(0)))
        for source, name in (("autoencoder_256", "autoencoder-256"), ("all_256", "scenes-256")):
            folder = Path("data/emoji3d") / name
            store(f"recipes.emoji3d.samples:{source}", folder, arguments.samples, workers=workers)
    done = run(arguments.side, arguments.minutes, train=train_until, stop_at=stop_at, keep=arguments.keep)
    print("the chain is finished" if done else "stopped; the same command continues")


if __name__ == "__main__":
    main()
