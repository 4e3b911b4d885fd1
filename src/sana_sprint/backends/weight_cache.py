"""Tensors made from a convolution's weight and kept until it changes; and how a change of weights is noticed."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


def all_tensors(*models: nn.Module) -> list[Tensor]:
    """All parameters and buffers; shared ones are repeated.

    `parameters()` makes every tensor's name and takes five times as long.
    """
    found: list[Tensor | None] = []
    for module in all_modules(*models):
        found += module._parameters.values()
        found += module._buffers.values()
    return [tensor for tensor in found if tensor is not None]


def all_modules(*models: nn.Module) -> list[nn.Module]:
    """The models and all modules inside; shared ones are repeated."""
    modules: list[nn.Module | None] = list(models)
    for module in modules:  # grows on the way
        if module is not None:
            modules += module._modules.values()
    return [module for module in modules if module is not None]


def weight_version(tensor: Tensor) -> tuple[object, ...]:
    """A value that differs after any replacement, move, cast or in-place write that torch versions."""
    return (
        # Quantised and sharded parameters are subclasses that may have no storage of their own.
        tensor.data_ptr() if type(tensor) in (nn.Parameter, Tensor) else id(tensor),
        0 if tensor.is_inference() else tensor._version,  # inference tensors count no versions
        tensor.dtype,
        tensor.device,
    )


class CachedFromWeight:
    """`make` of a convolution's weight, kept until that is replaced, moved, cast or written to.

    As far as torch tells: it does not for writes through `.data` and by optimizers with `fused=True`; call `clear` before
    those. The tensors lie here and not in the modules, so copies of a model and files do not have them.
    """

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        self.make = make
        self._kept: WeakKeyDictionary[nn.Module, tuple[object, Tensor]] = WeakKeyDictionary()

    def of(self, conv: nn.Conv2d) -> Tensor:
        """`make(conv.weight)`."""
        weight = conv.weight
        if torch.compiler.is_compiling():
            return self.make(weight)  # a graph keeps nothing; beside the convolution it is next to no work
        version = weight_version(weight)
        kept = self._kept.get(conv)
        if kept is None or kept[0] != version:
            kept = self._kept[conv] = version, self.make(weight)
        return kept[1]

    def __contains__(self, conv: nn.Module) -> bool:
        """Whether a convolution's tensor is kept."""
        return conv in self._kept

    def clear(self, conv: nn.Module) -> None:
        """Free the memory."""
        if not torch.compiler.is_compiling():
            self._kept.pop(conv, None)
