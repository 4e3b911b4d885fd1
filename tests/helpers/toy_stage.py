"""A stage that is a toy, and ways to train it: in this process, in others, and side by side.

`python -m tests.helpers.toy_stage JOB` trains toys; see `in_processes`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sana_sprint.train import checkpoint, config, distributed, loop
from sana_sprint.train.data.sampler import shuffled
from sana_sprint.train.stages.base import Metrics, Part
from tests.helpers.training import parse, silent


class Toy:
    """Two players on ten vectors, so that an epoch is no multiple of the batch; noise comes from torch's generator.

    `die_at` kills the process, as nothing can be prepared for, in the loss of that step.
    """

    kept: ClassVar[dict[str, nn.Module]] = {}

    def __init__(self, run: config.AnyRun, *, die_at: int | None = None) -> None:
        torch.manual_seed(run.seed)
        self.run = run
        self.die_at = die_at
        self.seen: list[tuple[str, list[int]]] = []
        # 40 wide: large enough a matrix for Muon. No seam is symmetric, so that every parameter's gradient differs.
        self.student = nn.Sequential(
            nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 6)
        )
        self.players: Mapping[str, nn.Module] = {"student": self.student}
        if len(run.optimizers) == 2:
            # Its vectors move with every forward pass, as those of the real one's heads.
            judge = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 1))
            self.players = {**self.players, "discriminator": judge}
        self.inputs = torch.randn(10, 6, generator=torch.Generator().manual_seed(1))

    @property
    def data(self) -> Mapping[str, str]:
        return {"vectors": str(len(self.inputs))}

    def player(self, step: int) -> str:
        return list(self.players)[step % len(self.players)]

    def loss(self, part: Part) -> tuple[Tensor, Metrics]:
        if part.step == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        player, indices = self.player(part.step), shuffled(part.indices, len(self.inputs), self.run.seed)
        self.seen.append((player, indices.tolist()))
        x = self.inputs[indices]
        made = self.student(x + 0.1 * torch.randn_like(x))
        judge = self.players.get("discriminator", nn.Identity())
        if player == "discriminator":
            return (judge(made.detach()) - judge(x) + 1).relu().mean(), {}
        loss = (made - x.flip(1)).square().mean() - 0.1 * judge(made).mean()
        return loss, {"turn": float(part.step), f"only_{part.step % 4}": 1.0}

    def validate(self, folder: Path, step: int) -> Metrics:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.student.state_dict(), folder / f"{step}.pt")
        return {"size": sum(p.square().sum().item() for p in self.student.parameters())}

    def export(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.student.state_dict(), folder / "student.pt")


def toy_run(output: Path, *, steps: int = 4, players: int = 2, **fields: Any) -> dict[str, Any]:
    """Fields may be dotted: `{"schedule.accumulation": 2}`."""
    values: dict[str, Any] = {
        "stage": "student",
        "output": str(output),
        "teacher": "none",
        "data": {"source": "none"},
        "ema_decay": 0.9,
        "optimizer": {"warmup_steps": 1, "learning_rate": 0.01, "weight_decay": 0.01},
        "schedule": {"steps": steps, "batch_size": 4, "log_every": 2, "sample_every": 100, "save_every": 5},
    }
    if players == 2:
        values["discriminator"] = {"blocks": [0], "optimizer": {"name": "came", "warmup_steps": 0}}
    for name, value in fields.items():
        *sections, last = name.split(".")
        section = values
        for each in sections:
            section = section[each]
        section[last] = value
    return values


def train_toy(values: dict[str, Any], **settings: Any) -> Toy:
    run = parse(values)
    toy = Toy(run, die_at=settings.pop("die_at", None))
    loop.run(toy, run, report=silent, **settings)
    return toy


def saved(folder: Path) -> dict[str, Tensor]:
    """Everything in a run's newest checkpoint, by dotted names."""

    def flat(value: Any, name: str) -> dict[str, Tensor]:
        if isinstance(value, Mapping):
            return {k: v for key, each in value.items() for k, v in flat(each, f"{name}.{key}").items()}
        return {name: torch.as_tensor(value)}

    content = torch.load(checkpoint.checkpoints(folder)[-1], weights_only=True)
    return flat(content["trainer"], "")


def assert_same(one: Path, other: Path) -> None:
    """Two runs ended in the same state, to the last bit."""
    first, second = saved(one), saved(other)
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def in_processes(
    runs: Sequence[dict[str, Any]],
    *,
    processes: int = 1,
    die_at: int | None = None,
    stopped: dict[str, Any] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Trains toys one after another in new processes; then one that the last process is told to stop."""
    root = Path(__file__).resolve().parents[2]
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    paths = [root / "src", root]
    return subprocess.run(
        [
            *launcher,
            "-m",
            "tests.helpers.toy_stage",
            json.dumps({"runs": list(runs), "die_at": die_at, "stopped": stopped}),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def main(argument: str) -> None:
    torch.set_num_threads(1)
    distributed.start()
    wanted = json.loads(argument)
    for values in wanted["runs"]:
        train_toy(values, die_at=wanted["die_at"])
    if wanted["stopped"]:
        is_last = distributed.rank() == distributed.world_size() - 1
        train_toy(wanted["stopped"], should_stop=lambda: is_last)
    group = weakref.ref(torch.distributed.group.WORLD) if wanted["stopped"] else lambda: None
    distributed.stop()
    assert group() is None, "the group outlives its end, and its threads with it"


if __name__ == "__main__":
    main(sys.argv[1])
