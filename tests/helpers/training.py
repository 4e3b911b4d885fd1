"""Tiny training runs: a data source, configs of the stages that finish in seconds, and what of them is read."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import TypeAdapter

from sana_sprint.train import config, loop, sections
from sana_sprint.train.losses import Loss
from sana_sprint.train.stages import make_stage
from sana_sprint.train.stages.base import Stage

COLORS = {"red": (220, 30, 30), "green": (20, 200, 60), "blue": (30, 60, 220)}


def colored_square(index: int) -> tuple[np.ndarray, str]:
    """A 16 px picture with a coloured square somewhere on gray, and its caption."""
    rng = np.random.default_rng(index)
    name = list(COLORS)[index % len(COLORS)]
    picture = np.full((16, 16, 3), 128, np.uint8)
    x, y = rng.integers(0, 8, 2)
    picture[y : y + 8, x : x + 8] = COLORS[name]
    return picture, f"a {name} square"


def square_mask(pixels: np.ndarray, position: int) -> np.ndarray:
    """A condition for `colored_square`: white where the square is, black elsewhere."""
    inside = (pixels != 128).any(axis=2, keepdims=True)
    return np.repeat(np.where(inside, np.uint8(255), np.uint8(0)), 3, axis=2)


def parse(values: dict[str, Any]) -> config.AnyRun:
    return TypeAdapter[config.AnyRun](config.RunConfig).validate_python(values)


def silent(_: str) -> None:
    """A report nobody reads."""


def make(run: config.AnyRun) -> Stage:
    return make_stage(run, report=silent)


Kind = TypeVar("Kind", bound=Loss)


def loss_of(stage: Any, kind: type[Kind]) -> Kind:
    """The stage's one loss of this class."""
    (found,) = (each for each in stage.losses if isinstance(each, kind))
    return found


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
    section = sections.Section

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
    train(full_run(folder / "student", folder / "teacher" / "final"))
    train(control_teacher_run(folder / "control-teacher", folder))
    train(control_student_run(folder / "control-student", folder))
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
        "data": {"source": "tests.helpers.training:colored_square"},
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
        "data": {"source": "tests.helpers.training:colored_square", "num_samples": 24},
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
            "timestep_scale": 0.001,
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
        "data": {"source": "tests.helpers.training:colored_square", "num_samples": 24},
        "optimizer": {"warmup_steps": 1, "learning_rate": 1e-4},
        "schedule": _schedule(steps),
    }


def student_run(output: Path, teacher: Path, *, steps: int = 4) -> dict[str, Any]:
    return {
        "stage": "student",
        "output": str(output),
        "precision": "fp32",
        "teacher": str(teacher),
        "data": {"source": "tests.helpers.training:colored_square", "num_samples": 24},
        "optimizer": {"warmup_steps": 1, "learning_rate": 1e-4},
        "schedule": _schedule(steps),
    }


def hybrid_run(output: Path, teacher: Path, *, steps: int = 4, **discriminator: Any) -> dict[str, Any]:
    """A student with a discriminator; further arguments are the latter's fields."""
    heads = {"blocks": [0, 1], "optimizer": {"warmup_steps": 0}, **discriminator}
    return {**student_run(output, teacher, steps=steps), "discriminator": heads}


def full_run(output: Path, teacher: Path, *, steps: int = 4) -> dict[str, Any]:
    """A student with every loss there is."""
    run = hybrid_run(output, teacher, steps=steps, r1_weight=0.1)
    return {
        **run,
        "twinflow": {},
        "matching": {"optimizer": {"warmup_steps": 0}},
        "trajectories": {"count": 24, "num_steps": 2},
    }


def weighed_run(run: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """A run with every loss, with [f_divergence] in the place of its [matching]."""
    kept = {name: value for name, value in run.items() if name != "matching"}
    judge = {**run["discriminator"], "loss": "logistic", "misaligned_pairs": False}
    return {**kept, "discriminator": judge, "f_divergence": {**run["matching"], **settings}}


def trajectories_run(output: Path, teacher: Path, *, steps: int = 4) -> dict[str, Any]:
    """A student that learns from its teacher's trajectories alone."""
    run = student_run(output, teacher, steps=steps)
    return {**run, "scm_weight": 0.0, "trajectories": {"count": 24, "num_steps": 3, "noise_rate": 0.25}}


def control_teacher_run(output: Path, chain: Path, *, steps: int = 3) -> dict[str, Any]:
    """A branch for the teacher of a chain."""
    return {
        "stage": "control-teacher",
        "output": str(output),
        "precision": "fp32",
        "teacher": str(chain / "teacher" / "final"),
        "data": {"source": "tests.helpers.training:colored_square", "num_samples": 24},
        "control": {"condition": "tests.helpers.training:square_mask", "num_copies": 1},
        "optimizer": {"warmup_steps": 1, "learning_rate": 1e-3},
        "schedule": _schedule(steps),
    }


def control_student_run(output: Path, chain: Path, *, steps: int = 4) -> dict[str, Any]:
    """A branch for the student of a chain, from its control-teacher run."""
    return {
        **full_run(output, chain / "teacher" / "final", steps=steps),
        "stage": "control-student",
        "student": str(chain / "student" / "final"),
        "controlnet": str(chain / "control-teacher" / "final" / "controlnet"),
        "condition": "tests.helpers.training:square_mask",
    }
