"""Computed once, kept on disk in parts: each a safetensors file named by a hash of everything it was computed from.

So a stopped computation goes on with the first part that is not there, a grown set adds only its new parts, and
nothing stale can be met: other data or another model has other names. Parts are read memory-mapped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from sana_sprint.train import distributed

Part = tuple[dict[str, Tensor], dict[str, Any]]  # what a file holds: tensors and facts
PART_SIZE = 512  # samples: 32 MB of 1024 px latents

Made = TypeVar("Made")


def cut(count: int) -> list[range]:
    """Samples 0 to count - 1 in parts."""
    return [range(start, min(start + PART_SIZE, count)) for start in range(0, count, PART_SIZE)]


def make_parts(count: int, make: Callable[[range], Made], *, label: str) -> dict[range, Made]:
    """Has every part of samples 0 to count - 1 made, each by one of the processes; returns all, in order.

    Args:
        count: samples.
        make: given a part's samples, returns where it is, such as its file, made if absent.
        label: of the progress bar.
    """
    parts = cut(count)
    rank, size = distributed.rank(), distributed.world_size()
    with tqdm(parts[rank::size], desc=label, unit="part", dynamic_ncols=True, disable=rank != 0) as own:
        made = {part: make(part) for part in own}
    everywhere = {part: place for each in distributed.gather(made) for part, place in each.items()}
    return {part: everywhere[part] for part in parts}


def write_part(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Writes a part, whole or not at all, also if the machine loses its power."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".partial-{os.getpid()}")  # two runs may make the same part
    packed = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(packed, partial, metadata={"facts": json.dumps(facts)})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)  # of a failure


def read_part(path: Path) -> Part:
    """Tensors that are read from the file when they are looked at, and the facts."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["facts"])  # noqa: SIM118


def digest(*facts: object) -> str:
    """A hash of the facts' texts; a module counts with its class, its weights and their dtypes."""
    total = hashlib.sha256()
    for fact in facts:
        if not isinstance(fact, nn.Module):
            total.update(f"{fact}\n".encode())
            continue
        total.update(type(fact).__name__.encode())
        for name, tensor in sorted(fact.state_dict().items()):
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            total.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()
