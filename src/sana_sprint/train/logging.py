"""Progress bar, `log.jsonl` and TensorBoard of a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from sana_sprint.train import distributed
from sana_sprint.train.config import AnyRun
from sana_sprint.train.stages.base import Metrics

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """Averages what is added between two entries, over steps and processes.

    Every process calls every method; the first one writes. Values that are not finite stay out of the averages.
    """

    def __init__(self, config: AnyRun, first_step: int) -> None:
        self._path = config.output / "log.jsonl"
        self._batch_size = config.schedule.batch_size
        self._is_main = distributed.rank() == 0
        self._board = (
            _tensorboard(config.output, first_step) if config.tensorboard and self._is_main else None
        )
        self._sums: dict[str, tuple[float, int]] = {}
        self._seconds, self._steps = 0.0, 0
        if self._is_main and self._path.is_file():
            _forget_after(self._path, first_step)
        self._progress = tqdm(
            total=config.schedule.steps,
            initial=first_step,
            desc=config.stage,
            unit="step",
            disable=not self._is_main,
        )

    def add(self, metrics: Metrics, seconds: float) -> None:
        """A step's metrics, and how long it took."""
        for name, value in metrics.items():
            if math.isfinite(value):
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = (total + value, count + 1)
        self._seconds += seconds
        self._steps += 1
        self._progress.update()

    def write_averages(self, step: int, counters: Metrics) -> None:
        """An entry of what was added since the last one, the speed, and counters as they are."""
        speed = self._steps * self._batch_size / self._seconds
        averages = _averages(distributed.gather(self._sums))
        self.write(step, {**averages, **counters, "samples_per_s": round(speed, 2)})
        loss = {"loss": f"{averages['loss']:.4f}"} if "loss" in averages else {}
        self._progress.set_postfix({**loss, "pictures/s": f"{speed:.1f}"}, refresh=False)
        self._sums, self._seconds, self._steps = {}, 0.0, 0

    def write(self, step: int, values: Metrics) -> None:
        """An entry as it is."""
        if not self._is_main:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Ends the progress bar and the files."""
        self._progress.close()
        if self._board:
            self._board.close()


def _averages(parts: list[dict[str, tuple[float, int]]]) -> Metrics:
    names = dict.fromkeys(name for part in parts for name in part)
    found = {name: [part[name] for part in parts if name in part] for name in names}
    return {
        name: sum(total for total, _ in each) / sum(count for _, count in each)
        for name, each in found.items()
    }


def _forget_after(path: Path, step: int) -> None:
    """Drops entries of steps that will be done again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    # A line without its end is one that a crash cut off.
    path.write_text(
        "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step),
        encoding="utf-8",
    )


def _tensorboard(folder: Path, first_step: int) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        message = 'tensorboard = true needs TensorBoard: pip install "sana-sprint[train]"'
        raise ImportError(message, name="tensorboard") from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
