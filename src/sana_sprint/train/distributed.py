"""Several processes, one run: torchrun starts them, each takes its part of every batch.

Gradients are averaged after the backward pass rather than inside a wrapper module, so that the stages can
use `torch.func` transforms, which wrappers do not mix with. On a CPU, one single-threaded process per core
is also faster than one process with many threads when the machine has other work.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, distributed


def start() -> None:
    """Joins the process group that torchrun announced; alone, does nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(device())
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def stop() -> None:
    """Leaves the process group."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def device() -> torch.device:
    """Where this process computes: its own CUDA device, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def rank() -> int:
    """This process's number, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Replaces every gradient by its mean over the processes."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= world_size()
    offset = 0
    for gradient in gradients:
        gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
        offset += gradient.numel()


def average(value: float) -> float:
    """The mean of a number over the processes."""
    if world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device())
    distributed.all_reduce(total)
    return float(total) / world_size()


def barrier() -> None:
    """Waits until every process is here."""
    if distributed.is_initialized():
        distributed.barrier()
