"""Several processes, one run: torchrun starts them, each takes its parts of every batch.

Modules stay whole and unwrapped in every process, so that a stage may call any of their methods, several times in a
step, and differentiate them with `torch.func`; gradients are averaged after the backward pass. Optimiser states and
the moving average, which are the larger part of the memory, can be divided among the processes by whole parameters.
On a CPU, one single-threaded process per core is also faster than one process with many threads when the machine has
other work.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

_BUCKET = 2**24  # elements


def start() -> None:
    """Initialises the process group under torchrun; otherwise a no-op."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        # An optimiser's first step imports this. Imported while there is a group, it keeps that as the default of its
        # arguments, so `stop` would not end the group's threads, and one that is busy when Python exits aborts the process.
        importlib.import_module("torch.distributed.nn.functional")
        if torch.cuda.is_available():
            torch.cuda.set_device(device())
        # Processes wait for the first one's validation and export, and for the slowest at encoding latents.
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(hours=12))


def stop() -> None:
    """Leaves the process group."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def device() -> torch.device:
    """The device of this process: its own CUDA device, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def rank() -> int:
    """This process's number, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def barrier() -> None:
    """Waits until every process is here."""
    if distributed.is_initialized():
        distributed.barrier()


def gather(value: Any) -> list[Any]:
    """Every process's value, in their order; for small things of any kind."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Replaces every gradient by its mean over the processes."""
    if world_size() == 1:
        return
    for bucket in buckets_of([parameter.grad for parameter in parameters if parameter.grad is not None]):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        distributed.all_reduce(flat)
        _unpack(flat.div_(world_size()), bucket)


def average(value: float) -> float:
    """The mean of a number over the processes."""
    if world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device())
    distributed.all_reduce(total)
    return total.item() / world_size()


def owners(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """Divides parameters among the processes: the largest first, each to the process that has least so far."""
    loads = [0] * world_size()
    chosen = {}
    for name, parameter in sorted(parameters.items(), key=lambda item: -item[1].numel()):
        chosen[name] = loads.index(min(loads))
        loads[chosen[name]] += parameter.numel()
    return chosen


@torch.no_grad()
def share(parameters: Mapping[str, Tensor], owner: Mapping[str, int]) -> None:
    """Gives every process its owner's value of each parameter."""
    for source in range(world_size()):
        values = [parameter for name, parameter in parameters.items() if owner[name] == source]
        for bucket in buckets_of(values):
            _unpack(_broadcast(torch.cat([value.flatten() for value in bucket]), source), bucket)


def collect(tree: Mapping[str, Any]) -> dict[str, Any]:
    """All processes' nested dicts of tensors and plain values as one: in the first process; the others get nothing.

    One tensor at a time, and on the CPU, so that no device holds more than one that is not its own.
    """
    leaves = dict(_leaves(tree))
    # Tensors without data tell the others what will come.
    outline = {path: leaf.to("meta") if isinstance(leaf, Tensor) else leaf for path, leaf in leaves.items()}
    merged: dict[str, Any] = {}
    for source, foreign in enumerate(gather(outline)):
        for path, leaf in foreign.items():
            if isinstance(leaf, Tensor):
                own = leaves[path] if source == rank() else torch.empty_like(leaf, device=device())
                leaf = _broadcast(own.to(device()), source).cpu()
            if rank() == 0:
                *parents, last = path
                functools.reduce(lambda level, key: level.setdefault(key, {}), parents, merged)[last] = leaf
    return merged


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _broadcast(value: Tensor, source: int) -> Tensor:
    if world_size() > 1:
        distributed.broadcast(value, source)
    return value


def buckets_of(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in groups of about `_BUCKET` elements: few messages, and little memory for their copies."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(each.numel() for each in bucket) >= _BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _unpack(flat: Tensor, targets: Sequence[Tensor]) -> None:
    for target, piece in zip(targets, torch.split(flat, [target.numel() for target in targets]), strict=True):
        target.copy_(piece.view_as(target))
