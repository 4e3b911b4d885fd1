"""Items on training by the command line: every stage for a few steps, stopped, killed and resumed, on tiny pictures."""

from __future__ import annotations

import functools
import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from checkouts.record import Record, item, succeed

WORLD = """
import numpy as np
COLORS = {"red": (220, 30, 30), "green": (20, 200, 60), "blue": (30, 60, 220)}
def square(index):
    rng = np.random.default_rng(index)
    name = list(COLORS)[index % len(COLORS)]
    picture = np.full((16, 16, 3), 128, np.uint8)
    x, y = rng.integers(0, 8, 2)
    picture[y : y + 8, x : x + 8] = COLORS[name]
    return picture, f"a {name} square"
def mask(pixels, position):
    inside = (pixels != 128).any(axis=2, keepdims=True)
    return np.repeat(np.where(inside, np.uint8(255), np.uint8(0)), 3, axis=2)
"""
SQUARES = {"source": "probe_world:square", "num_samples": 24}
# Of log.jsonl: how fast the machine was.
SPEED = "samples_per_s"
# The fake-score model's earlier name in log.jsonl.
RENAMED = ("follower_", "fake_model_")


# ----- running --------------------------------------------------------------------------------------------------------


def toml(values: Mapping[str, Any], prefix: str = "") -> str:
    """Nested values as a TOML file's text."""
    sections = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if key not in sections]
    text = "\n".join(lines) + "\n"
    for key, value in sections.items():
        text += f"[{prefix}{key}]\n" + toml(value, f"{prefix}{key}.")
    return text


def write_stage(name: str, values: Mapping[str, Any]) -> Path:
    """A stage file for a run in the folder `name`."""
    Path("probe_world.py").write_text(WORLD, encoding="utf-8")
    path = Path(f"{name.replace('/', '-')}.toml")
    path.write_text(toml({"output": name, **values}), encoding="utf-8")
    return path


def train(name: str, values: Mapping[str, Any], *stops: int) -> Path:
    """The folder of a run, which first ends after each number of steps in `stops` and is then continued."""
    path = write_stage(name, values)
    for steps in stops:
        succeed("train", path, f"schedule.steps={steps}")
    succeed("train", path)
    return Path(name)


def train_in_process(path: Path, folder: Path, checkpoint: int, signal_number: int) -> None:
    """The run in a process of its own, which gets a signal when it has written this checkpoint."""
    words = [sys.executable, "-m", "sana_sprint", "train", str(path)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wanted = folder / f"checkpoint-{checkpoint:08d}.pt"
    while process.poll() is None and not wanted.exists():
        time.sleep(0.01)
    process.send_signal(signal_number)
    process.wait()
    if not wanted.exists():
        raise RuntimeError(f"{path} ended with {process.returncode} before its checkpoint {checkpoint}")


def note_run(record: Record, folder: Path) -> None:
    """The log without the speed, sample grids and the exported model."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [
        {key.replace(*RENAMED): value for key, value in json.loads(line).items() if key != SPEED}
        for line in lines
    ]
    for row in rows:
        record.note(f"log, step {row['step']}, {'loss' if 'loss' in row else 'validation'}", row)
    for part in ("samples", "final"):
        record.note_folder(part, folder / part)


# ----- the stages -----------------------------------------------------------------------------------------------------


def schedule(steps: int, **more: Any) -> dict[str, Any]:
    every = {"log_every": 1, "sample_every": steps, "save_every": 1, "keep_checkpoints": 100}
    return {"steps": steps, "batch_size": 4, **every, **more}


def optimizer(rate: float = 1e-3, **more: Any) -> dict[str, Any]:
    """A constant rate, for a run that is given more steps later."""
    return {"warmup_steps": 1, "learning_rate": rate, "decay_fraction": 0.0, **more}


def autoencoder_values(**more: Any) -> dict[str, Any]:
    model: dict[str, Any] = {
        "latent_channels": 4,
        "attention_head_dim": 4,
        "upsample_block_type": "interpolate",
        "downsample_block_type": "conv",
    }
    for side in ("encoder", "decoder"):
        model[f"{side}_block_types"] = ["ResBlock", "ResBlock", "EfficientViTBlock"]
        model[f"{side}_block_out_channels"] = [8, 8, 16]
        model[f"{side}_layers_per_block"] = [0, 1, 1]
        model[f"{side}_qkv_multiscales"] = [[], [], [5]]
    return {
        "stage": "autoencoder",
        "precision": "fp32",
        "data": {"source": "probe_world:square"},
        "model": model,
        "optimizer": optimizer(),
        "schedule": schedule(3),
        **more,
    }


def teacher_values(**more: Any) -> dict[str, Any]:
    return {
        "stage": "teacher",
        "precision": "fp32",
        "autoencoder": str(autoencoder() / "final"),
        "tokenizer_vocab": 400,
        "data": SQUARES,
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
        "optimizer": optimizer(name="muon"),
        "schedule": schedule(3),
        **more,
    }


def student_values(**more: Any) -> dict[str, Any]:
    """A student by the consistency loss alone, unless more is given."""
    return {
        "stage": "student",
        "precision": "fp32",
        "teacher": str(teacher() / "final"),
        "data": SQUARES,
        "optimizer": optimizer(1e-4),
        "schedule": schedule(3),
        **more,
    }


DISCRIMINATOR = {"blocks": [0, 1], "optimizer": {"warmup_steps": 0}, "r1_weight": 0.1}
MATCHING = {"optimizer": {"warmup_steps": 0}}
TRAJECTORIES = {"count": 24, "num_steps": 2}
FULL = {"discriminator": DISCRIMINATOR, "matching": MATCHING, "trajectories": TRAJECTORIES}


@functools.cache
def autoencoder() -> Path:
    return train("runs/autoencoder", autoencoder_values(), 2)


@functools.cache
def teacher() -> Path:
    return train("runs/teacher", teacher_values(), 2)


@functools.cache
def student() -> Path:
    return train("runs/student", student_values(**FULL, schedule=schedule(7)), 4)


@functools.cache
def control_teacher() -> Path:
    values = {
        "stage": "control-teacher",
        "precision": "fp32",
        "teacher": str(teacher() / "final"),
        "data": SQUARES,
        "control": {"condition": "probe_world:mask", "num_copies": 1},
        "optimizer": optimizer(),
        "schedule": schedule(3),
    }
    return train("runs/control-teacher", values, 2)


# ----- items ----------------------------------------------------------------------------------------------------------


@item("training/autoencoder", autoencoder)
@item("training/teacher", teacher)
@item("training/student", student)
@item("training/control-teacher", control_teacher)
def main_run(record: Record, run: Any) -> None:
    """The runs that others start from, each stopped once and continued."""
    note_run(record, run())


@item("training/autoencoder-bf16", {"precision": "bf16", "latent_noise": 0.3, "latent_weight": 0.01})
@item("training/autoencoder-accumulated", {"schedule": schedule(3, accumulation=2)})
def other_autoencoder(record: Record, more: dict[str, Any]) -> None:
    name = "runs/autoencoder-" + "-".join(more)
    note_run(record, train(name, autoencoder_values(**more)))


@item("training/teacher-adamw", {"optimizer": optimizer(name="adamw", weight_decay=0.1)})
@item("training/teacher-came", {"optimizer": optimizer(name="came", decay="cosine", decay_fraction=0.5)})
@item("training/teacher-bf16", {"precision": "bf16", "gradient_checkpointing": True})
@item(
    "training/teacher-accumulated",
    {"schedule": schedule(3, accumulation=2), "time_mean": 0.3, "time_std": 0.8},
)
def other_teacher(record: Record, more: dict[str, Any]) -> None:
    name = "runs/teacher-" + "-".join(more) + more.get("optimizer", {}).get("name", "")
    note_run(record, train(name, teacher_values(**more)))


@item("training/teacher-started")
def started_teacher(record: Record) -> None:
    values = teacher_values(start=str(teacher() / "final"))
    for name in ("model", "text_encoder", "tokenizer_vocab"):
        del values[name]
    note_run(record, train("runs/teacher-started", values))


@item("training/adaptation", {})
@item("training/adaptation-cached", {"cache_text": True})
def adaptation(record: Record, more: dict[str, Any]) -> None:
    values = {**student_values(**more), "stage": "adaptation"}
    note_run(record, train("runs/adaptation-" + "-".join(more), values, 1))


STUDENTS: dict[str, dict[str, Any]] = {
    "scm": {},
    "scm-jvp": {"tangent": "jvp", "tangent_warmup_steps": 2},
    "scm-difference": {"tangent": "difference", "time_mean": 0.0, "time_std": 1.2},
    "guided": {
        "guidance_projected": True,
        "guidance_limit": 2.0,
        "guidance_from": 0.2,
        "guidance_scales": [3.0, 6.0],
    },
    "adversarial": {"discriminator": {**DISCRIMINATOR, "misaligned_pairs": False, "weight": 0.7}},
    "adversarial-only": {"scm_weight": 0.0, "discriminator": DISCRIMINATOR, "max_time_rate": 0.2},
    "matching": {"matching": {**MATCHING, "warmup_steps": 2, "time_mean": 0.2}, "recompute_pictures": False},
    "matching-only": {"scm_weight": 0.0, "matching": MATCHING},
    "trajectories": {"scm_weight": 0.0, "trajectories": {"count": 24, "num_steps": 3, "noise_rate": 0.25}},
    "cached": {"cache_text": True, "discriminator": DISCRIMINATOR, "matching": MATCHING},
    "accumulated": {**FULL, "schedule": schedule(4, accumulation=2)},
    "bf16": {**FULL, "precision": "bf16", "schedule": schedule(4), "gradient_checkpointing": True},
}


def _each_student(function: Any) -> Any:
    for name, more in STUDENTS.items():
        item(f"training/student-{name}", name, more)(function)
    return function


@_each_student
def other_student(record: Record, name: str, more: dict[str, Any]) -> None:
    values = {"schedule": schedule(4), **more}
    note_run(record, train(f"runs/student-{name}", student_values(**values)))


@item("training/student-started")
def started_student(record: Record) -> None:
    values = student_values(start=str(student() / "final"), discriminator=DISCRIMINATOR)
    note_run(record, train("runs/student-started", values))


@item("training/student-killed", signal.SIGKILL)
@item("training/student-stopped", signal.SIGTERM)
def interrupted_student(record: Record, signal_number: int) -> None:
    """A run that a signal ended, at whatever step, and that went on."""
    name = f"runs/student-{signal_number.name}"  # type: ignore[attr-defined]
    path = write_stage(name, student_values(**FULL, schedule=schedule(12)))
    train_in_process(path, Path(name), 4, signal_number)
    succeed("train", path)
    note_run(record, Path(name))


@item("training/student-processes")
def student_of_two_processes(record: Record) -> None:
    """States divided over two processes, and a resume."""
    path = write_stage("runs/student-two", student_values(**FULL, distribution="shard", schedule=schedule(4)))
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for more in (["schedule.steps=2"], []):
        words = [*call, "-m", "sana_sprint", "train", str(path), *more]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    note_run(record, Path("runs/student-two"))


@item("training/control-teacher-official")
def other_control_teacher(record: Record) -> None:
    values = {
        "stage": "control-teacher",
        "precision": "bf16",
        "teacher": str(teacher() / "final"),
        "data": SQUARES,
        "cache_text": True,
        "control": {"condition": "canny", "num_copies": 1, "topology": "official"},
        "optimizer": optimizer(),
        "schedule": schedule(3),
    }
    note_run(record, train("runs/control-teacher-official", values))


@item("training/control-student", FULL)
@item("training/control-student-scm", {})
def control_student(record: Record, more: dict[str, Any]) -> None:
    values = {
        **student_values(**more, schedule=schedule(5)),
        "stage": "control-student",
        "student": str(student() / "final"),
        "controlnet": str(control_teacher() / "final" / "controlnet"),
        "condition": "probe_world:mask",
    }
    note_run(record, train(f"runs/control-student-{len(more)}", values, 3))


# ----- sources of data ------------------------------------------------------------------------------------------------


def write_sources(folder: Path) -> dict[str, Path]:
    """The same few pictures with captions in every form that a source can have."""
    import pyarrow
    from pyarrow import parquet

    folder.mkdir(exist_ok=True)
    captions = [["a red one", "something red"], ["a green one"], ["a blue one", "the sea"]] * 4
    pictures = []
    for i in range(len(captions)):
        data = io.BytesIO()
        pixels = np.random.default_rng(i).integers(0, 255, (16 + 2 * (i % 3), 20, 3), np.uint8)
        Image.fromarray(pixels).save(data, "PNG")
        pictures.append(data.getvalue())
    (folder / "files").mkdir(exist_ok=True)
    for i, picture in enumerate(pictures):
        (folder / "files" / f"{i:04d}.png").write_bytes(picture)
        (folder / "files" / f"{i:04d}.txt").write_text("\n".join(captions[i]), encoding="utf-8")
    rows = [{"image": f"files/{i:04d}.png", "captions": texts} for i, texts in enumerate(captions)]
    (folder / "set.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    lines = ["file_name,caption", *(f"files/{i:04d}.png,{texts[0]}" for i, texts in enumerate(captions))]
    (folder / "set.csv").write_text("\n".join(lines), encoding="utf-8")
    table = [
        {"image": {"bytes": p, "path": None}, "text": t} for p, t in zip(pictures, captions, strict=True)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(table), folder / "set.parquet", row_group_size=5)
    with tarfile.open(folder / "set.tar", "w") as archive:
        for i, picture in enumerate(pictures):
            for suffix, data in (("png", picture), ("txt", captions[i][0].encode())):
                member = tarfile.TarInfo(f"deep/{i:04d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    names = ("files", "set.jsonl", "set.csv", "set.parquet", "set.tar")
    return {name: folder / name for name in names}


@item("training/sources")
def sources(record: Record) -> None:
    for name, path in write_sources(Path("sources")).items():
        record.note(name, json.loads(succeed("data", "check", path, "--size", 16, "--multiple", 4, "--json")))
        values = teacher_values(
            data={"source": str(path), "size": 16, "num_samples": 12}, schedule=schedule(2)
        )
        folder = train(f"runs/teacher-{name}", values)
        lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        record.note(f"{name}: log", [json.loads(line) for line in lines])


@item("training/pruned")
def pruned(record: Record) -> None:
    """Of the caches of two runs those of one are found to be unused."""
    for name in ("one", "two"):
        values = adaptation_of(24 if name == "one" else 20)
        train(f"pruned/{name}", values)
    out = succeed("data", "prune", "pruned", "--keep", "pruned-one.toml", "--dry-run")
    record.note("last line", out.splitlines()[-1])
    record.note("files", len(out.splitlines()))


def adaptation_of(count: int) -> dict[str, Any]:
    values = student_values(data={**SQUARES, "num_samples": count}, cache_text=True, schedule=schedule(1))
    return {**values, "stage": "adaptation"}
