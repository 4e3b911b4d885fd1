"""Devices and dtypes that the Triton kernels run on."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

OLDEST_CAPABILITY = (8, 0)  # Ampere: bf16 and tf32 products
LARGEST_HEAD_DIM = 128  # of linear attention: its sums over tokens stay in registers
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_triton() -> None:
    """Raise ValueError if Triton is not installed."""
    if find_spec("triton") is None:
        raise ValueError(
            "fused kernels need Triton, which comes with torch's CUDA builds: pip install triton"
        )


@cache
def runs_on(device: torch.device) -> bool:
    """Whether this device runs the kernels."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY
    )


def on_device(x: Tensor) -> torch.cuda.device:
    """The context for launching kernels on x: Triton launches on the current device."""
    return torch.cuda.device(x.device.index if x.is_cuda else -1)
