"""Which layers of a model are quantised, and which devices can run them.

What stays as it is: time and guidance embedding, patch embedding, caption projection, `proj_out` and norms of the
transformer; Gemma's embedding table and norms; the first and last convolution of the decoder, its depthwise ones and the
encoder. They are a small part of the work and a large part of the error; `benchmarks/quantized.py --sensitive` measures it.
And the decoder's upsampling convolutions, see `UPSAMPLING`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import nn

from sana_sprint.quantize.formats import PRESETS
from sana_sprint.quantize.layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear

# Component -> the prefix of the layers that are quantised, and exceptions from it.
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "text_encoder": ("layers.", ()),
    "transformer": ("transformer_blocks.", ()),
    "controlnet": ("transformer_blocks.", ()),
    "vae": ("decoder.", ("decoder.conv_in", "decoder.conv_out")),
}
# Without its weight, four-phase upsampling would be a convolution of the large grid again, in 9/4 of the operations.
UPSAMPLING = re.compile(r"decoder\.up_blocks\.\d+\.\d+\.conv")
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
    """As `quantize_model`, with codes that are unset: for a file to fill."""
    _check_preset(preset)
    _replace(model, component, preset, lambda kind, layer: kind(layer, preset))


def check_device(preset: str, component: str, device: torch.device) -> None:
    """Raise ValueError, saying what would do, if `device` cannot run `component` in this preset."""
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
        return None if _has_vnni() else "needs a CPU with VNNI instructions"
    if component == "vae":
        return "needs the CPU: its convolutions have no other kernels"
    return (
        None if capability >= INT8_CAPABILITY else "needs a CPU or an NVIDIA GPU of capability 7.5 or later"
    )


def _has_vnni() -> bool:
    has_onednn: bool = torch._C._has_mkldnn
    return has_onednn and torch.cpu._is_vnni_supported()


# ----- replacing ------------------------------------------------------------------------------------------------------


def _replace(
    model: nn.Module,
    component: str,
    preset: str,
    make: Callable[[type[QuantizedLayer], nn.Linear | nn.Conv2d], QuantizedLayer],
) -> None:
    if component not in PARTS:
        raise ValueError(f"{component} cannot be quantised; components that can: {', '.join(PARTS)}")
    multiple = 16 if preset == "fp8" else 8  # what the kernels can do, and what 4-bit codes need to be packed
    found = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and _fits(name, layer, component, multiple)
    }
    if not found:
        raise ValueError(
            f"{component} has no layers that {preset} fits: their sizes must be multiples of {multiple}"
        )
    for name, layer in found.items():
        acts_on_pictures = component == "vae" and isinstance(layer, nn.Conv2d)
        kind = QuantizedConv2d if acts_on_pictures else QuantizedLinear
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, make(kind, layer))
    model.quantization = preset  # type: ignore[assignment]  # a plain attribute, no module or tensor


def _fits(name: str, layer: nn.Linear | nn.Conv2d, component: str, multiple: int) -> bool:
    prefix, exceptions = PARTS[component]
    if (
        not name.startswith(prefix)
        or name in exceptions
        or any(name.startswith(f"{it}.") for it in exceptions)
        or UPSAMPLING.fullmatch(name)
    ):
        return False
    if isinstance(layer, nn.Conv2d):
        if layer.groups > 1 or layer.dilation != (1, 1) or layer.padding_mode != "zeros":
            return False
        if component != "vae" and layer.kernel_size != (1, 1):
            return False
    return layer.weight.shape[0] % multiple == 0 and layer.weight[0].numel() % multiple == 0
