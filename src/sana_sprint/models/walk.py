"""A model's tensors, fast enough to look at all of them in every call, and what tells that one has changed."""

from __future__ import annotations

from torch import Tensor, nn


def tensors_of(*models: nn.Module) -> list[Tensor]:
    """All parameters and buffers, one that is shared as often as it is found.

    `parameters()` makes every tensor's name and takes five times as long.
    """
    found: list[Tensor | None] = []
    modules: list[nn.Module | None] = list(models)
    for module in modules:  # grows on the way
        if module is not None:
            modules += module._modules.values()
            found += module._parameters.values()
            found += module._buffers.values()
    return [tensor for tensor in found if tensor is not None]


def state_of(tensor: Tensor) -> tuple[object, ...]:
    """Changes when a weight is replaced, moved, cast or, as far as torch counts that, written to."""
    return (
        # Quantised and sharded parameters are subclasses that may have no storage of their own.
        tensor.data_ptr() if type(tensor) in (nn.Parameter, Tensor) else id(tensor),
        0 if tensor.is_inference() else tensor._version,  # inference tensors count no versions
        tensor.dtype,
        tensor.device,
    )
