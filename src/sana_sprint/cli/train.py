"""`sana-sprint train`: one stage of a model, from its TOML file."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sana_sprint.cli.common import CommandError, checked, import_from_here

if TYPE_CHECKING:
    from sana_sprint.train.config import AnyRun
    from sana_sprint.train.stages.base import Report, Stage


def train(
    stage: Annotated[
        Path, typer.Argument(metavar="STAGE.toml", help="The stage to train: model, data and schedule.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Fields to change, such as schedule.steps=100."),
    ] = None,
) -> None:
    """Train one stage: an autoencoder, a teacher, its adaptation or a student.

    Ctrl-C or SIGTERM finishes the step, saves and stops; a second one stops at once. A run that was stopped continues
    from its last checkpoint when the same command is given again (resume=latest, never or a checkpoint say otherwise). A data source such
    as recipes.emoji.scenes:training_scene is looked for in the current folder. For several processes use
    torchrun --nproc-per-node 2 -m sana_sprint train STAGE.toml
    """
    from sana_sprint.train.config import load_config

    config = checked(
        lambda: load_config(stage, overrides or ()),
        hint="a call looks like `sana-sprint train recipes/emoji/student.toml schedule.steps=100`",
    )
    import_from_here()

    from sana_sprint.train import distributed, loop

    set_threads()
    distributed.start()
    report = _reporter(is_main=distributed.rank() == 0)
    try:
        made = _make_stage(config, report)
        with received_signals() as received:
            is_finished = loop.run(made, config, report=report, should_stop=lambda: bool(received))
        if not is_finished:
            report("the same command continues")
            # A process that was not signalled itself stops for another that was.
            raise typer.Exit(128 + (received[0] if received else signal.SIGTERM))
        if distributed.rank() == 0:
            typer.echo(config.output / "final")
    finally:
        distributed.stop()


@contextmanager
def received_signals() -> Iterator[list[int]]:
    """A list that receives the first SIGINT or SIGTERM; the second one acts as it always does."""
    received: list[int] = []

    def receive(number: int, _: object) -> None:
        received.append(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # A signal that is ignored stays so: nohup and background jobs of shells rely on it.
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, receive)
        yield received
    finally:
        restore()


def set_threads() -> None:
    import torch

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available():
        torch.set_num_threads(1)  # one process per core; more threads would only wait for one another


def _reporter(*, is_main: bool) -> Report:
    from tqdm import tqdm

    def report(line: str) -> None:
        if is_main:
            tqdm.write(line, file=sys.stderr)  # above the progress bar

    return report


def _make_stage(config: AnyRun, report: Report) -> Stage:
    from sana_sprint.train.stages import make_stage

    try:
        return make_stage(config, report=report)
    except ValueError as error:
        hint = f"folders and modules named in the file are looked for from here: {os.getcwd()}"
        raise CommandError(str(error), hint=hint) from error
