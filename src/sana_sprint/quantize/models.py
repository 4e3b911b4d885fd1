"""Quantisation of a model: the layers that are replaced, and the devices that can run them.

Not quantised: time and guidance embedding, patch embedding, caption projection, `proj_out` and norms of the
transformer; Gemma's embedding table and norms; the first and last convolution of the decoder, its depthwise ones and the
encoder. They are a small part of the work and a large part of the error; `benchmarks/quantized.py --sensitive` measures it.
Where only weights are rounded, the decoder's convolutions of repeated pixels stay too: there are more numbers in their
phases' kernels, see `QuantizedPhases`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from sana_sprint.backends.cpu.subpixel import phase_convolution
from sana_sprint.models.dc_blocks import UpBlock
from sana_sprint.quantize.formats import PRESETS
from sana_sprint.quantize.layers import (
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedLinear,
    QuantizedPhases,
    QuantizedUpBlock,
)
from sana_sprint.torch_private import has_vnni

# Component -> the prefix of the layers that are quantised, and exceptions from it.
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "text_encoder": ("layers.", ()),
    "transformer": ("transformer_blocks.", ()),
    "controlnet": ("transformer_blocks.", ()),
    "vae": ("decoder.", ("decoder.conv_in", "decoder.conv_out")),
}
FP8_CAPABILITY = (8, 9)
INT8_CAPABILITY = (7, 5)


def quantize_model(model: nn.Module, component: str, preset: str) -> None:
    """Replace the layers of `model`, which is a pipeline's `component`, by quantised ones, in place.

    Raises:
        ValueError: for an unknown preset, a device that cannot run it, a component that is quantised already or has no
            layers to quantise.
    """
    if (present := getattr(model, "quantization", None)) is not None:
        raise ValueError(f"{component} is quantised already, as {present}")
    check_device(preset, component, next(model.parameters()).device)
    _replace(model, component, preset, lambda kind, layer: kind.of(layer, preset))


def make_quantized(model: nn.Module, component: str, preset: str) -> None:
    """As `quantize_model`, with uninitialised codes, to be loaded from a file."""
    _check_preset(preset)
    _replace(model, component, preset, lambda kind, layer: kind(layer, preset))


def check_device(preset: str, component: str, device: torch.device) -> None:
    """Raise ValueError, naming the presets that work, if `device` cannot run `component` in this one."""
    _check_preset(preset)
    if reason := _why_not(preset, component, device):
        able = [name for name in PRESETS if _why_not(name, component, device) is None]
        raise ValueError(f"{preset} of {component} {reason}; {device} can run {', '.join(able)}")


def _check_preset(preset: str) -> None:
    if preset not in PRESETS:
        raise ValueError(f"no such quantisation: {preset!r}; allowed: {', '.join(PRESETS)}")


def _why_not(preset: str, component: str, device: torch.device) -> str | None:
    if not PRESETS[preset].rounds_activations:
        return None
    has_cuda = device.type == "cuda" and torch.cuda.is_available()
    capability = torch.cuda.get_device_capability(device) if has_cuda else (0, 0)
    if preset == "fp8":
        if component == "vae":
            return "has no kernels: its convolutions exist in int8 only"
        return None if capability >= FP8_CAPABILITY else "needs an NVIDIA GPU of capability 8.9 or later"
    if device.type == "cpu":
        return None if has_vnni() else "needs a CPU with VNNI instructions"
    if component == "vae":
        return "needs the CPU: its convolutions have no other kernels"
    return (
        None if capability >= INT8_CAPABILITY else "needs a CPU or an NVIDIA GPU of capability 7.5 or later"
    )


# ----- replacing ------------------------------------------------------------------------------------------------------


def _replace(
    model: nn.Module,
    component: str,
    preset: str,
    make: Callable[[type[QuantizedLayer], nn.Linear | nn.Conv2d], QuantizedLayer],
) -> None:
    if component not in PARTS:
        raise ValueError(f"{component} cannot be quantised; components that can: {', '.join(PARTS)}")
    multiple = 16 if preset == "fp8" else 8  # required by the kernels, and for packing 4-bit codes
    found = {
        name: (kind, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
        and _fits(layer, multiple)
        and (kind := _kind(model, name, layer, component, preset)) is not None
    }
    if not found:
        raise ValueError(
            f"{component} has no layers that {preset} fits: their sizes must be multiples of {multiple}"
        )
    for name, (kind, layer) in found.items():
        if kind is QuantizedPhases:
            assert isinstance(layer, nn.Conv2d)
            layer = phase_convolution(layer)
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        setattr(owner, leaf, make(kind, layer))
        if kind is QuantizedPhases:
            owner.__class__ = QuantizedUpBlock
    model.quantization = preset  # type: ignore[assignment]  # a plain attribute, no module or tensor


def _kind(
    model: nn.Module, name: str, layer: nn.Linear | nn.Conv2d, component: str, preset: str
) -> type[QuantizedLayer] | None:
    """The class that replaces the layer; None where it stays."""
    prefix, exceptions = PARTS[component]
    if not name.startswith(prefix) or any(f"{name}.".startswith(f"{it}.") for it in exceptions):
        return None
    if isinstance(layer, nn.Linear):
        return QuantizedLinear
    if layer.groups > 1 or layer.dilation != (1, 1):
        return None
    if component != "vae":
        return QuantizedLinear if layer.kernel_size == (1, 1) else None
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, UpBlock) and owner.interpolate:
        return QuantizedPhases if PRESETS[preset].rounds_activations else None
    return QuantizedConv2d if layer.padding_mode == "zeros" else None


def _fits(layer: nn.Linear | nn.Conv2d, multiple: int) -> bool:
    """Whether the number of outputs, and of products per output, are multiples of `multiple`."""
    return layer.weight.shape[0] % multiple == 0 and layer.weight[0].numel() % multiple == 0
