"""Exchanging the classes of a model's modules: other code for the same weights, names, hooks and files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

from torch import nn

Classes = Mapping[type[nn.Module], type[nn.Module]]


def swap(model: nn.Module, classes: Classes) -> None:
    """Give every module inside `model` (itself too) whose class is a key of `classes` that key's value as its class.

    Subclasses of a key stay as they are: they have code of their own.
    """
    for module in model.modules():
        wanted = classes.get(type(module))
        if wanted is not None:
            if isinstance(module, HasWeightCache):
                module.clear()
            module.__class__ = wanted


def inverse(classes: Classes) -> Classes:
    """The exchange that undoes another."""
    return {new: old for old, new in classes.items()}


class HasWeightCache(nn.Module):
    """A module for which tensors made from its weights are kept, see `weight_cache`."""

    def clear(self) -> None:
        """Free their memory: the weights may be about to change, and fused optimizers leave no trace."""
        raise NotImplementedError

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self.clear()  # or a model that is moved away would leave it behind
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return self
