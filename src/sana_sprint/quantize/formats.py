"""Storage of quantised weights as codes and scales: encoding and decoding for each preset."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

INT8_MAX = 127
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
GROUPS = (64, 32, 16, 8)  # inputs that share a scale in 4 bits: the largest that divides the layer's
# Quantiles of a normal distribution, scaled to [-1,1] (QLoRA, arXiv 2305.14314, appendix E).
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
INT4_LEVELS = tuple(code / 7 for code in range(-8, 8))


@dataclass(frozen=True)
class Preset:
    """How weights are stored (`codes`: "int8", "fp8" or "int4") and whether activations are rounded too."""

    codes: str
    rounds_activations: bool = False
    levels: tuple[float, ...] = ()  # of 4-bit codes


PRESETS = {
    "int8": Preset("int8", rounds_activations=True),
    "int8-weights": Preset("int8"),
    "fp8": Preset("fp8", rounds_activations=True),
    "nf4": Preset("int4", levels=NF4_LEVELS),
    "int4-weights": Preset("int4", levels=INT4_LEVELS),
}


def storage(preset: str, outputs: int, inputs: int) -> tuple[tuple[int, int], torch.dtype, tuple[int, int]]:
    """(shape of the codes, their dtype, shape of the scales) of a weight (outputs, inputs)."""
    kind = PRESETS[preset].codes
    if kind == "int4":
        return (outputs, inputs // 2), torch.uint8, (outputs, inputs // group_size(inputs))
    # fp8 is kept as bytes: a float would be cast by `.to(dtype)` and when a file is loaded in another dtype.
    return (outputs, inputs), torch.int8 if kind == "int8" else torch.uint8, (outputs, 1)


def group_size(inputs: int) -> int:
    """Inputs per scale in 4 bits; `inputs` is a multiple of 8."""
    return next(size for size in GROUPS if inputs % size == 0)


def encode(weight: Tensor, preset: str) -> tuple[Tensor, Tensor]:
    """Weight (outputs, inputs) -> codes and scales, see `storage`. Scales are fp32 holding bf16 numbers.

    So a scale survives casts to bf16 and back exactly, and the layer's dtype can be the scale's.
    """
    kind = PRESETS[preset].codes
    wide = weight.float()
    if kind == "int4":
        return _encode_4_bits(wide, PRESETS[preset].levels)
    largest = INT8_MAX if kind == "int8" else FP8_MAX
    scale = _round_up(wide.abs().amax(1, keepdim=True) / largest)
    scaled = (wide / scale).clamp(-largest, largest)
    return (scaled.round().to(torch.int8) if kind == "int8" else scaled.to(FP8).view(torch.uint8)), scale


def decode(codes: Tensor, scale: Tensor, preset: str) -> Tensor:
    """The dequantised weight (outputs, inputs), in the scales' dtype."""
    kind = PRESETS[preset].codes
    if kind == "int8":
        return codes.to(scale.dtype) * scale
    if kind == "fp8":
        return codes.view(FP8).to(scale.dtype) * scale
    grouped = F.embedding(codes.int(), _pairs(preset, scale.dtype, codes.device)).view(*scale.shape, -1)
    return (grouped * scale[..., None]).flatten(1)


@cache
def _pairs(preset: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The two levels encoded by each byte, (256,2): one look-up for two codes."""
    levels = torch.tensor(PRESETS[preset].levels, dtype=dtype, device=device)
    byte = torch.arange(256, device=device)
    return torch.stack([levels[byte & 15], levels[byte >> 4]], dim=1)


def _encode_4_bits(wide: Tensor, levels: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    grouped = wide.reshape(len(wide), -1, group_size(wide.shape[1]))
    scale = _round_up(grouped.abs().amax(2, keepdim=True))
    table = torch.tensor(levels, device=wide.device)
    middles = (table[1:] + table[:-1]) / 2
    nearest = torch.bucketize((grouped / scale).flatten(1), middles).to(torch.uint8)
    return nearest[:, ::2] | nearest[:, 1::2] << 4, scale.squeeze(2)


def _round_up(scale: Tensor) -> Tensor:
    """Rounded up to a value representable in bf16; never 0, so that codes of a row of zeros are defined."""
    scale = scale.clamp_min(torch.finfo(torch.float16).tiny)
    rounded = scale.bfloat16().float()
    return torch.where(rounded < scale, (scale * (1 + 2**-7)).bfloat16().float(), rounded)
