"""Products of rounded activations with rounded weights, on the units that the device has for them.

Activations are rounded per row (token or pixel) or per picture, never over a batch: what a picture becomes does not
depend on its neighbours.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sana_sprint.quantize.formats import FP8, FP8_MAX, INT8_MAX

ZERO = (
    128  # the code of 0: the CPU's 8-bit units take unsigned activations only, others run in a slow reference
)
_TINY = 1e-30  # keeps the scale of a row of zeros defined
_FEWEST_ROWS = 32  # torch._int_mm takes no fewer than 17


def pack(codes: Tensor) -> Tensor:
    """Weight codes (outputs, inputs) int8 in the order in which the CPU's kernel reads them."""
    packed: Tensor = _op("qlinear_prepack")(codes, None)
    return packed


def int8_rows(x: Tensor, codes: Tensor, packed: Tensor | None, scale: Tensor) -> Tensor:
    """`x @ weight.T` for rows x (M, inputs), codes (outputs, inputs), scale (outputs,); in the scale's dtype."""
    if packed is not None:
        step = _step(x, INT8_MAX)
        return _cpu_rows((x / step).round_(), packed, scale).mul_(step)
    few = _FEWEST_ROWS - len(x)
    x, rows = (F.pad(x, (0, 0, 0, few)) if few > 0 else x), len(x)
    if _has_kernels(x):
        from sana_sprint.quantize.rounding import round_rows, scale_sums

        rounded, step = round_rows(x, torch.int8, INT8_MAX, _TINY)
        return scale_sums(torch._int_mm(rounded, codes.t()), step, scale)[:rows]
    step = _step(x, INT8_MAX)
    sums = torch._int_mm((x / step).round_().to(torch.int8), codes.t())
    return (sums * step * scale.float()).to(scale.dtype)[:rows]


def _step(x: Tensor, largest: float) -> Tensor:
    """What each row is divided by, (M,1) fp32."""
    return x.abs().amax(1, keepdim=True).float().clamp_min(_TINY) / largest


def _has_kernels(x: Tensor) -> bool:
    return x.is_cuda and not torch.compiler.is_compiling() and x.stride(1) == 1 and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _cpu_rows(rounded: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    out: Tensor = _op("qlinear_pointwise")(
        rounded.add_(ZERO).to(torch.uint8), 1.0, ZERO, packed, scale.float(), _zeros(scale), None,
        1.0, 0, scale.dtype, "none", [], "",
    )  # fmt: skip  # the kernel's thirteen positions: input, weight, bias, output, fused operation
    return out


def fp8_rows(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """As `int8_rows` in float8_e4m3; bf16 is the only result the kernel has for scales per row."""
    if _has_kernels(x):
        from sana_sprint.quantize.rounding import round_rows

        rounded, step = round_rows(x, FP8, FP8_MAX, _TINY)
    else:
        step = _step(x, FP8_MAX)
        rounded = (x / step).clamp_(-FP8_MAX, FP8_MAX).to(FP8)
    columns = scale.float()[None]
    product = torch._scaled_mm(
        rounded, codes.view(FP8).t(), scale_a=step, scale_b=columns, out_dtype=torch.bfloat16
    )
    return product.to(scale.dtype)


def pack_convolution(codes: Tensor, scale: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    """Codes (outputs, inputs, kernel, kernel) int8 in the order in which the CPU's convolution reads them."""
    packed: Tensor = _op("qconv_prepack")(codes, scale.float(), 1.0, ZERO, stride, padding, [1, 1], 1, None)
    return packed


def int8_convolution(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, stride: list[int], padding: list[int]
) -> Tensor:
    """Convolution of pictures x (B,C,H,W), each rounded on its own; in the scale's dtype, channels_last.

    One picture at a time: the kernel then multiplies by the picture's scale itself, and at sizes that take any time
    a batch gains nothing.
    """
    steps = x.abs().amax((1, 2, 3), keepdim=True).float().clamp_min(_TINY) / INT8_MAX
    rounded = (x / steps).round_().add_(ZERO).to(torch.uint8, memory_format=torch.channels_last)
    wide_bias = None if bias is None else bias.detach().float()
    pictures = [
        _op("qconv2d_pointwise")(
            picture, step, ZERO, packed, scale.float(), _zeros(scale), wide_bias,
            stride, padding, [1, 1], 1, 1.0, 0, scale.dtype, "none", [], "",
        )
        for picture, step in zip(torch.split(rounded, 1), steps.flatten().tolist(), strict=True)
    ]  # fmt: skip  # as above, with the convolution's geometry
    return pictures[0] if len(pictures) == 1 else torch.cat(pictures)


def _op(name: str) -> Any:
    return getattr(torch.ops.onednn, name)


def _zeros(scale: Tensor) -> Tensor:
    return torch.zeros(len(scale), dtype=torch.int64)
