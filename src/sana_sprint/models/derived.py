"""Tensors that are made from a convolution's weight, and kept until it changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sana_sprint.models.walk import state_of


class Derived:
    """`make` of a convolution's weight, kept until that is replaced, moved, cast or written to.

    As far as torch tells: it does not for writes through `.data` and by optimizers with `fused=True`.
    """

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        self.make = make
        self._kept: tuple[object, Tensor] | None = None

    def of(self, conv: nn.Conv2d) -> Tensor:
        """`make(conv.weight)`."""
        weight = conv.weight
        if torch.compiler.is_compiling():
            return self.make(weight)  # a graph keeps nothing; beside the convolution it is next to no work
        key = state_of(weight)
        kept = self._kept
        if kept is None or kept[0] != key:
            kept = self._kept = key, self.make(weight)
        return kept[1]

    def forget(self) -> None:
        """Free the memory."""
        self._kept = None

    def __getstate__(self) -> dict[str, Any]:
        return {"make": self.make, "_kept": None}  # copies and files are better off without them
