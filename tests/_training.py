"""Tiny training runs: a data source, configs of the stages that finish in seconds, and a stage that is a toy.

`python -m tests._training RUNS` trains toys; RUNS is a JSON list of their configs.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from sana_sprint.train import checkpoint, config, distributed, loop
from sana_sprint.train.adaptation_stage import AdaptationStage
from sana_sprint.train.autoencoder_stage import AutoencoderStage
from sana_sprint.train.data.order import shuffled
from sana_sprint.train.stage import Metrics, Part, Stage
from sana_sprint.train.student_stage import StudentStage
from sana_sprint.train.teacher_stage import TeacherStage

COLORS = {"red": (220, 30, 30), "green": (20, 200, 60), "blue": (30, 60, 220)}


def colored_square(index: int) -> tuple[np.ndarray, str]:
    """A 16 px picture with a coloured square somewhere on gray, and its caption."""
    rng = np.random.default_rng(index)
    name = list(COLORS)[index % len(COLORS)]
    picture = np.full((16, 16, 3), 128, np.uint8)
    x, y = rng.integers(0, 8, 2)
    picture[y : y + 8, x : x + 8] = COLORS[name]
    return picture, f"a {name} square"


# ----- the real stages ------------------------------------------------------------------------------------------------


def parse(values: dict[str, Any]) -> config.AnyRun:
    return TypeAdapter[config.AnyRun](config.RunConfig).validate_python(values)


def silent(_: str) -> None:
    """A report nobody reads."""


def make(run: config.AnyRun) -> Stage:
    if isinstance(run, config.AutoencoderRun):
        return AutoencoderStage(run, report=silent)
    if isinstance(run, config.AdaptationRun):
        return AdaptationStage(run, report=silent)
    if isinstance(run, config.TeacherRun):
        return TeacherStage(run, report=silent)
    return StudentStage(run, report=silent)


def train(values: dict[str, Any]) -> Stage:
    run = parse(values)
    with reads(run.stage):
        stage = make(run)
        loop.run(stage, run, report=silent)
    return stage


# What `reads` fills: (stage, section, field) of every config field that training has read.
FIELDS_READ: set[tuple[str, str, str]] = set()


@contextmanager
def reads(stage: str) -> Iterator[None]:
    """Notes every config field that is read inside, and none that pydantic itself reads to check or to dump."""
    section = config._Section

    def noting(self: Any, name: str) -> Any:
        if name in type(self).model_fields:
            FIELDS_READ.add((stage, type(self).__name__, name))
        return object.__getattribute__(self, name)

    section.__getattribute__ = noting  # type: ignore[method-assign]
    try:
        yield
    finally:
        del section.__getattribute__


@functools.cache
def chain() -> Path:
    """A folder with a run of every stage, named after it, each of a few steps; made once for all tests."""
    folder = Path(tempfile.mkdtemp(prefix="sana-sprint-chain-"))
    atexit.register(shutil.rmtree, folder)
    train(autoencoder_run(folder / "autoencoder"))
    train(teacher_run(folder / "teacher", folder / "autoencoder" / "final"))
    train(adaptation_run(folder / "adaptation", folder / "teacher" / "final"))
    train(hybrid_run(folder / "student", folder / "teacher" / "final", r1_weight=0.1))
    return folder


def _schedule(steps: int) -> dict[str, Any]:
    return {"steps": steps, "batch_size": 4, "log_every": 1, "sample_every": steps, "save_every": 1}


def autoencoder_run(output: Path, *, steps: int = 3) -> dict[str, Any]:
    stages: dict[str, Any] = {"latent_channels": 4}
    for side in ("encoder", "decoder"):
        stages[f"{side}_block_out_channels"] = [8, 8, 16]
        stages[f"{side}_layers_per_block"] = [0, 1, 1]
        stages[f"{side}_qkv_multiscales"] = [[], [], []]
    return {
        "stage": "autoencoder",
        "output": str(output),
        "precision": "fp32",
        "data": {"source": "_training:colored_square"},
        "model": stages,
        "optimizer": {"warmup_steps": 1},
        "schedule": _schedule(steps),
    }


def teacher_run(
    output: Path, autoencoder: Path, *, steps: int = 3, optimizer: str = "muon"
) -> dict[str, Any]:
    return {
        "stage": "teacher",
        "output": str(output),
        "precision": "fp32",
        "autoencoder": str(autoencoder),
        "tokenizer_vocab": 400,
        "data": {"source": "_training:colored_square", "num_samples": 24},
        "text_encoder": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
        },
        "model": {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 32,
            "cross_attention_dim": 64,
            "caption_channels": 16,
            "sample_size": 4,
            "qk_norm": "rms_norm_across_heads",
        },
        "optimizer": {"name": optimizer, "warmup_steps": 1},
        "schedule": _schedule(steps),
    }


def adaptation_run(output: Path, teacher: Path, *, steps: int = 2) -> dict[str, Any]:
    return {
        "stage": "adaptation",
        "output": str(output),
        "precision": "fp32",
        "teacher": str(teacher),
        "data": {"source": "_training:colored_square", "num_samples": 24},
        "optimizer": {"warmup_steps": 1, "learning_rate": 1e-4},
        "schedule": _schedule(steps),
    }


def student_run(output: Path, teacher: Path, *, steps: int = 4) -> dict[str, Any]:
    return {
        "stage": "student",
        "output": str(output),
        "precision": "fp32",
        "teacher": str(teacher),
        "data": {"source": "_training:colored_square", "num_samples": 24},
        "optimizer": {"warmup_steps": 1, "learning_rate": 1e-4},
        "schedule": _schedule(steps),
    }


def hybrid_run(output: Path, teacher: Path, *, steps: int = 4, **discriminator: Any) -> dict[str, Any]:
    """A student with a discriminator; further arguments are the latter's fields."""
    heads = {"blocks": [0, 1], "optimizer": {"warmup_steps": 0}, **discriminator}
    return {**student_run(output, teacher, steps=steps), "discriminator": heads}


# ----- a toy ----------------------------------------------------------------------------------------------------------


class Toy:
    """Two players on ten vectors, so that an epoch is no multiple of the batch; noise comes from torch's generator.

    `die_at` kills the process, as nothing can be prepared for, in the loss of that step.
    """

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
        self.data = torch.randn(10, 6, generator=torch.Generator().manual_seed(1))

    def player(self, step: int) -> str:
        return list(self.players)[step % len(self.players)]

    def loss(self, part: Part) -> tuple[Tensor, Metrics]:
        if part.step == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        player, indices = self.player(part.step), shuffled(part.indices, len(self.data), self.run.seed)
        self.seen.append((player, indices.tolist()))
        x = self.data[indices]
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
    return flat(content["learner"], "")


def assert_same(one: Path, other: Path) -> None:
    """Two runs ended in the same state, to the last bit."""
    first, second = saved(one), saved(other)
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def in_processes(
    runs: Sequence[dict[str, Any]], *, processes: int = 1, die_at: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Trains toys one after another in new processes."""
    root = Path(__file__).resolve().parents[1]
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    paths = [root / "src", root, root / "tests"]
    return subprocess.run(
        [*launcher, "-m", "tests._training", json.dumps({"runs": list(runs), "die_at": die_at})],
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
    distributed.stop()


if __name__ == "__main__":
    main(sys.argv[1])
