"""LoRAs in a model: merged into its weights in fp32, with the originals kept.

Generation costs nothing extra, every use of a weight sees the addition, and removing it restores the original bit for bit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sana_sprint.lora.files import Adapter

_HOME = "_lora"  # attribute of the model that holds its adapters


class Adapters:
    """The LoRAs of one model, by name, and the original weights of the layers they change.

    Methods write to the model: do not call them while it runs.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.weights: dict[str, float] = {}  # of the active ones
        self.fused = False
        self._adapters: dict[str, Adapter] = {}
        self._originals: dict[str, nn.Parameter] = {}
        self._other: tuple[object, nn.Module] | None = None  # the copy that `at` made last

    @classmethod
    def inside(cls, model: nn.Module) -> Adapters:
        """The adapters of `model`, created if it has none. They are stored on the model, so pipelines that share it share them."""
        adapters = adapters_of(model)
        if adapters is None:
            adapters = cls(model)
            setattr(model, _HOME, adapters)
        return adapters

    @property
    def names(self) -> list[str]:
        """Names of the loaded adapters, in loading order."""
        return list(self._adapters)

    def add(self, name: str | None, adapter: Adapter) -> str:
        """Add an adapter with weight 1 beside the active ones; returns its name."""
        self._refuse_fused("loading another LoRA")
        name = f"default_{len(self._adapters)}" if name is None else name
        if name in self._adapters:
            raise ValueError(f"a LoRA named {name!r} is loaded already; loaded: {', '.join(self.names)}")
        for layer in adapter:
            self._originals.setdefault(layer, _weight(self.model, layer))
        self._adapters[name] = adapter
        self._use({**self.weights, name: 1.0})
        return name

    def use(self, weights: Mapping[str, float]) -> None:
        """Activate exactly these adapters, each times its weight; the others stay loaded."""
        self._refuse_fused("set_adapters")
        if unknown := [name for name in weights if name not in self._adapters]:
            raise ValueError(
                f"no LoRA named {', '.join(map(repr, unknown))}; loaded: {', '.join(self.names) or 'none'}"
            )
        if wrong := [weight for weight in weights.values() if not math.isfinite(weight)]:
            raise ValueError(f"a LoRA's weight must be a finite number, got: {wrong[0]}")
        self._use(dict(weights))

    def fuse(self, scale: float) -> None:
        """Multiply all adapters by `scale` and freeze the result until `unfuse`."""
        self._refuse_fused("fuse_lora")
        check_scale("lora_scale", scale)
        self._write(self.model, scale)
        self.fused = True

    def unfuse(self) -> None:
        """Make adapters changeable again, at scale 1."""
        if not self.fused:
            raise ValueError("no LoRA is fused")
        self.fused = False
        self._write(self.model, 1.0)

    def remove(self) -> None:
        """Restore the original weights, bit for bit."""
        self._use({})

    def at(self, scale: float) -> nn.Module:
        """The model with all adapters multiplied by `scale`: itself at 1, else a copy that shares all other weights.

        The last copy is kept.
        """
        self._refuse_fused("attention_kwargs['scale']")
        check_scale("attention_kwargs['scale']", scale)
        if scale == 1.0:
            return self.model
        places = [_weight(self.model, layer) for layer in self._originals]
        key = (scale, [(place.device, place.dtype) for place in places], self.model.training)
        if self._other is None or self._other[0] != key:
            other = _shallow_copy(self.model)
            self._write(other, scale)
            self._other = key, other
        return self._other[1]

    def _refuse_fused(self, what: str) -> None:
        if self.fused:
            raise ValueError(f"{what} has no effect on a fused LoRA: call unfuse_lora first")

    def _use(self, weights: dict[str, float]) -> None:
        self.weights = weights
        self._write(self.model, 1.0)
        self._other = None

    def _write(self, model: nn.Module, scale: float) -> None:
        for layer, original in self._originals.items():
            _owner(model, layer).weight = self._merged(layer, original, _weight(model, layer), scale)

    def _merged(self, layer: str, original: nn.Parameter, place: Tensor, scale: float) -> nn.Parameter:
        """The layer's merged weight, on the device and in the dtype of `place`, its current one."""
        parts = [
            (scale * weight, self._adapters[name][layer])
            for name, weight in self.weights.items()
            if layer in self._adapters[name] and scale * weight
        ]
        if not parts and (original.device, original.dtype) == (place.device, place.dtype):
            return original
        with torch.no_grad():
            total = original.to(place.device)
            if parts:
                changes = sum(strength * part.delta(place.device) for strength, part in parts)
                total = total.float() + torch.as_tensor(changes).view(total.shape)
            return nn.Parameter(total.to(place.dtype), requires_grad=original.requires_grad)


def adapters_of(model: nn.Module) -> Adapters | None:
    """The adapters of `model`, or None."""
    return getattr(model, _HOME, None)


def settle(model: nn.Module) -> None:
    """Drop the adapters and originals of `model`; its weights stay merged."""
    if hasattr(model, _HOME):
        delattr(model, _HOME)


def check_scale(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got: {value!r}")


def _owner(model: nn.Module, layer: str) -> nn.Module:
    return model.get_submodule(layer)


def _weight(model: nn.Module, layer: str) -> nn.Parameter:
    weight = _owner(model, layer).weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _shallow_copy(module: nn.Module) -> nn.Module:
    """New modules that share parameters and buffers: replacing one leaves the original unchanged."""
    twin = copy.copy(module)
    twin._parameters = dict(module._parameters)
    twin._modules = {
        name: None if child is None else _shallow_copy(child) for name, child in module._modules.items()
    }
    return twin
