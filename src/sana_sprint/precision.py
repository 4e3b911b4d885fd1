"""Precision: the dtypes that each component may run in, and checks for values that are not finite.

Angles, schedules, latents between steps and re-noising are fp32 whatever the weights are. The transformer may run in any of
the three floating-point types below; the text encoder and the autoencoder must not run in fp16.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# (component, dtype) -> why it is refused
REFUSED_DTYPES = {
    ("text_encoder", torch.float16): "Gemma 2's activations overflow in it and the embeddings become NaN",
    ("vae", torch.float16): "the autoencoder's attention sums overflow in it and pictures come out black",
}


class NonFiniteError(RuntimeError):
    """A tensor holds NaN or infinity; the message names the stage that made it."""


# ----- dtypes ---------------------------------------------------------------------------------------------------------


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def check_dtype(component: str, dtype: torch.dtype | None) -> None:
    """Raise ValueError, with the reason, if `component` (its name in model_index.json) must not run in `dtype`."""
    if dtype is not None and (reason := REFUSED_DTYPES.get((component, dtype))):
        allowed = [name for name, kind in DTYPES.items() if (component, kind) not in REFUSED_DTYPES]
        raise ValueError(
            f"{component} cannot run in {dtype_name(dtype)}: {reason}; use {' or '.join(allowed)}"
        )


def parse_dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype or its name as a dtype; None and "auto" mean "as stored" and give None.

    Raises:
        ValueError: for a name or type that is none of `DTYPES`.
    """
    if value is None or value == "auto":
        return None
    dtype = DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype must be 'auto' or one of {', '.join(DTYPES)}, got: {value!r}")
    return dtype


def component_dtypes(
    request: torch.dtype | str | Mapping[str, torch.dtype | str | None] | None, components: Iterable[str]
) -> dict[str, torch.dtype | None]:
    """One dtype for all components, or a mapping of component name (and "default") to dtype, spelt out and checked.

    Returns:
        component -> dtype, None where the stored one is kept.

    Raises:
        ValueError: for an unknown component or dtype, and for a dtype that a component cannot run in.
    """
    names = list(components)
    if isinstance(request, Mapping):
        if unknown := sorted(set(request) - {*names, "default"}):
            raise ValueError(
                f"torch_dtype names unknown components: {', '.join(unknown)}; known: {', '.join(names)}, default"
            )
        wanted = {name: request.get(name, request.get("default")) for name in names}
    else:
        wanted = dict.fromkeys(names, request)
    dtypes = {name: parse_dtype(value) for name, value in wanted.items()}
    for name, dtype in dtypes.items():
        check_dtype(name, dtype)
    return dtypes


# ----- finite checks --------------------------------------------------------------------------------------------------


def check_finite(tensor: Tensor, stage: str) -> Tensor:
    """`tensor` itself, or NonFiniteError naming the `stage` that made it, such as "step 1 of 2".

    Inside `finite_checks_later`, a tensor on CUDA is returned unchecked.
    """
    checks = _LATER.get()
    if checks is not None and tensor.is_cuda:
        checks.append(_Check.of(tensor, stage))
    elif not bool(torch.isfinite(tensor).all()):
        _Check.of(tensor, stage).verify()
    return tensor


@contextmanager
def finite_checks_later(enabled: bool = True) -> Iterator[None]:
    """Defers `check_finite` to the end of the block, in order, so that no check waits for the device before."""
    checks: list[_Check] = []
    token = _LATER.set(checks if enabled else None)
    try:
        yield
    finally:
        _LATER.reset(token)
    for check in checks:
        check.verify()


@dataclass(frozen=True)
class _Check:
    """A pending check: counts of a tensor, without a reference to it."""

    num_finite: Tensor
    num_values: int
    dtype: torch.dtype
    stage: str

    @classmethod
    def of(cls, tensor: Tensor, stage: str) -> _Check:
        return cls(torch.isfinite(tensor).sum(), tensor.numel(), tensor.dtype, stage)

    def verify(self) -> None:
        num_bad = self.num_values - int(self.num_finite)
        if num_bad:
            raise NonFiniteError(
                f"{self.stage} gave {num_bad} of {self.num_values} values that are NaN or infinite, in "
                f"{dtype_name(self.dtype)}: the weights are damaged, or overflow in this dtype (try float32)"
            )


_LATER: ContextVar[list[_Check] | None] = ContextVar("finite checks", default=None)


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on `device`; from the CPU to CUDA without waiting until the device has come so far."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
