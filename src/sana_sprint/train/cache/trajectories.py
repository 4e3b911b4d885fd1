"""The guided teacher's trajectories, computed once and kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn

from sana_sprint.train.cache.files import PART_SIZE, Part, cut, digest, make_parts, read_part, write_part
from sana_sprint.train.data.sampler import BucketOrder
from sana_sprint.train.sections import DistillationRun, Section
from sana_sprint.trigflow import T_MAX, Velocity, expand_like, flow_to_trig, trig_to_flow

_FORMAT = "trajectories 1: bf16"  # part of every key; changes with what the files hold
CHUNK_SIZE = 64  # trajectories that are computed together; they have one shape and one way of prompting


class TrajectoriesConfig(Section):
    """`[trajectories]`: regression on the ends of the teacher's trajectories."""

    # How many are computed before the run and kept on disk, each of so many Euler steps with guidance.
    count: int = Field(ge=1)
    num_steps: int = Field(default=16, ge=1)
    # Factor of the loss beside the consistency loss.
    weight: float = Field(default=1.0, gt=0)
    # Part of the trajectories that start from pure noise; the others start from noised pictures.
    noise_rate: float = Field(default=0.5, ge=0, le=1)
    # Part of the visits that are to a trajectory's start; the others are to any of its points.
    start_rate: float = Field(default=0.3, ge=0, le=1)


@dataclass(frozen=True)
class Traced:
    """A chunk of trajectories and the conditions of their teacher."""

    points: Tensor  # (B,N+1,C,H,W), at flow times s0 (1 - k/N)
    flow_t: Tensor  # (B,), s0
    guidance: Tensor  # (B,)
    indices: Tensor  # (B,), of the samples in the cache of latents
    captions: Sequence[str]
    instruction: bool  # whether the complex human instruction stood in front of them


@dataclass(frozen=True)
class Points:
    """A batch of points, one of each trajectory, in unit space, and where their trajectories end: each (B,C,H,W)."""

    u: Tensor
    t: Tensor  # (B,), angles
    end: Tensor
    guidance: Tensor
    indices: Tensor
    captions: Sequence[str]
    instruction: bool


class Trajectories:
    """All trajectories of a run, mapped into memory.

    Args:
        config: their settings.
        parts: files' contents, in order.
        seed: of the order in which they are visited.
        facts: see `stage.Stage.data`.
    """

    def __init__(
        self, config: TrajectoriesConfig, parts: Sequence[Part], *, seed: int, facts: dict[str, str]
    ) -> None:
        self.config, self.seed, self.facts = config, seed, facts
        self._chunks = [chunk for part in parts for chunk in _unpacked(part)]
        buckets: dict[tuple[torch.Size, bool], list[int]] = {}
        for number, chunk in enumerate(self._chunks):
            own = buckets.setdefault((chunk.points.shape[1:], chunk.instruction), [])
            own += range(number * CHUNK_SIZE, number * CHUNK_SIZE + len(chunk.points))
        self._buckets = [torch.tensor(own) for own in buckets.values()]

    def __len__(self) -> int:
        return sum(map(len, self._buckets))

    def draw(self, indices: range, *, batch_size: int) -> Points:
        """Points of the trajectories at these positions of the training stream, drawn by torch's generator.

        A part `start_rate` of them are their trajectories' first points, and the others any but the last.
        """
        order = BucketOrder(self._buckets, batch_size, self.seed)(indices).tolist()
        rows = [(self._chunks[place // CHUNK_SIZE], place % CHUNK_SIZE) for place in order]
        steps = self.config.num_steps
        k = torch.randint(steps, (len(rows),))
        k = torch.where(torch.rand(len(rows)) < self.config.start_rate, 0, k)
        flow_t = torch.stack([chunk.flow_t[row] for chunk, row in rows]) * (1 - k / steps)
        x = torch.stack([chunk.points[row, i] for (chunk, row), i in zip(rows, k.tolist(), strict=True)])
        t = flow_to_trig(flow_t)
        return Points(
            u=x.float() * expand_like(torch.cos(t) + torch.sin(t), x),  # see `trigflow.flow_denoiser`
            t=t,
            end=torch.stack([chunk.points[row, -1] for chunk, row in rows]).float(),
            guidance=torch.stack([chunk.guidance[row] for chunk, row in rows]),
            indices=torch.stack([chunk.indices[row] for chunk, row in rows]),
            captions=[chunk.captions[row] for chunk, row in rows],
            instruction=rows[0][0].instruction,
        )


def draw_starts(count: int, noise_rate: float) -> Tensor:
    """Angles where trajectories start: pure noise for a part of them, else even between pi/4 and pi/2: (count,)."""
    t = T_MAX * (1 + torch.rand(count)) / 2
    return torch.where(torch.rand(count) < noise_rate, T_MAX, t)


@torch.no_grad()
def trace(velocity: Velocity, u: Tensor, t: Tensor, *, num_steps: int) -> Tensor:
    """Follows a flow from u (B,C,H,W) at angles t (B,) to the data: (B,N+1,C,H,W) bf16, in flow space.

    Euler steps, even in flow time: small angles at either end, where the path bends most.
    """
    start = trig_to_flow(t)
    x = u.float() / expand_like(torch.cos(t) + torch.sin(t), u)
    points = [x]
    for k in range(num_steps):
        v = velocity(x, start * (1 - k / num_steps)).float()
        x = x - expand_like(start / num_steps, x) * v
        points.append(x)
    return torch.stack(points, 1).bfloat16()


def cached_trajectories(
    folder: Path,
    config: TrajectoriesConfig,
    compute: Callable[[range], Traced],
    *,
    settings: Sequence[object],
    seed: int,
    report: Callable[[str], None],
) -> Trajectories:
    """A run's trajectories.

    Args:
        folder: receives `trajectories/`, a file for every 512, named by a hash of the settings. Files that are there are
            not made again. Several processes share the work.
        config: how many.
        compute: those at some positions of the training stream, at most `CHUNK_SIZE`, a function of these alone.
        settings: everything else that they depend on, as `parts.digest` takes it.
        seed: of the order in which they are visited.
        report: receives a line about them.
    """
    paths = trajectory_files(folder, config, settings)
    files = dict(zip(cut(config.count), paths, strict=True))

    def make(part: range) -> Path:
        path = files[part]
        if not path.is_file():
            starts = range(part.start, part.stop, CHUNK_SIZE)
            write_part(path, *_packed([compute(range(i, min(i + CHUNK_SIZE, part.stop))) for i in starts]))
        return path

    made = make_parts(config.count, make, label="trajectories")
    report(f"trajectories: {config.count} in {folder / 'trajectories'}")
    return Trajectories(
        config,
        [read_part(path) for path in made.values()],
        seed=seed,
        facts={"trajectories": digest(*(path.stem for path in paths))[:16]},
    )


def trajectory_settings(
    config: DistillationRun, latents: Mapping[str, str], text_encoder: nn.Module, *teacher: nn.Module
) -> Sequence[object]:
    """The dependencies of a run's trajectories beside their own settings, as `files.digest` takes them.

    Args:
        config: the run.
        latents: facts of all caches that it starts from.
        text_encoder: the prompts'.
        teacher: the modules that make it up.
    """
    fields = (
        "seed",
        "precision",
        "instruction_rate",
        *(name for name in type(config).model_fields if "guidance" in name),
    )
    used = {name: getattr(config, name) for name in fields}
    return used, dict(latents), text_encoder, *teacher


def trajectory_files(folder: Path, config: TrajectoriesConfig, settings: Sequence[object]) -> list[Path]:
    """The files that `cached_trajectories` with these arguments reads, whether they are there or not."""
    assert PART_SIZE % CHUNK_SIZE == 0  # so that only the last chunk of all may be smaller
    whole = digest(_FORMAT, config.num_steps, config.noise_rate, *settings)
    return [folder / "trajectories" / f"{digest(whole, part)[:32]}.safetensors" for part in cut(config.count)]


_TENSORS = ("points", "flow_t", "guidance", "indices")


def _packed(chunks: Sequence[Traced]) -> Part:
    tensors = {
        f"{i}.{name}": getattr(chunk, name).cpu() for i, chunk in enumerate(chunks) for name in _TENSORS
    }
    facts = [{"captions": list(chunk.captions), "instruction": chunk.instruction} for chunk in chunks]
    return tensors, {"chunks": facts}


def _unpacked(part: Part) -> list[Traced]:
    tensors, facts = part
    chunks: list[Traced] = []
    for i, chunk in enumerate(facts["chunks"]):
        points, flow_t, guidance, indices = (tensors[f"{i}.{name}"] for name in _TENSORS)
        chunks.append(Traced(points, flow_t, guidance, indices, chunk["captions"], chunk["instruction"]))
    return chunks
