"""Products of rounded activations with rounded weights, on the units that the device has for them.

Activations are rounded per row (token or pixel) or per picture, never over a batch: what a picture becomes does not
depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sana_sprint.models.frugal import PIECE
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


def int8_rows(
    x: Tensor, codes: Tensor, packed: Tensor | None, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`x @ weight.T + bias` for rows x (M, inputs), codes (outputs, inputs), scale and bias (outputs,); in the scale's dtype."""
    if packed is not None:
        return _cpu_rows(x, packed, scale, bias)
    out = _int8_rows(x, codes, scale)
    return out if bias is None else out + bias


def _int8_rows(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """By the product that torch has on every device."""
    few = _FEWEST_ROWS - len(x)
    x, rows = (F.pad(x, (0, 0, 0, few)) if few > 0 else x), len(x)
    if _has_kernels(x):
        from sana_sprint.quantize.rounding import round_rows, scale_sums

        with torch.cuda.device(x.device):  # Triton launches on the current device
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


def _cpu_rows(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Rounded, and scaled back, in pieces that stay in a core's cache: see `models.frugal`."""
    rounded = torch.empty(x.shape, dtype=torch.uint8)
    steps = torch.empty(len(x), 1)
    for rows in _pieces(x):
        steps[rows] = _step(x[rows], INT8_MAX)
        # Cut off, the sum is rounded. `addcmul` of two dtypes would take longer.
        rounded[rows] = torch.mul(x[rows], steps[rows].reciprocal()).add_(ZERO + 0.5)
    out: Tensor = _op("qlinear_pointwise")(
        rounded, 1.0, ZERO, packed, scale.float(), _zeros(scale), None,
        1.0, 0, scale.dtype, "none", [], "",
    )  # fmt: skip  # the kernel's thirteen positions: input, weight, bias, output, fused operation
    for rows in _pieces(out):
        piece = out[rows].mul_(steps[rows])
        if bias is not None:
            piece.add_(bias)
    return out


def _pieces(x: Tensor) -> Iterator[slice]:
    """Rows of x (M,N) that are in work at once."""
    rows = max(1, PIECE // x.shape[1])
    return (slice(first, first + rows) for first in range(0, len(x), rows))


def fp8_rows(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """As `int8_rows` in float8_e4m3; bf16 is the only result the kernel has for scales per row."""
    if _has_kernels(x):
        from sana_sprint.quantize.rounding import round_rows

        with torch.cuda.device(x.device):
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
    wide_bias = None if bias is None else bias.detach().float()
    pictures = []
    for picture in torch.split(x.contiguous(memory_format=torch.channels_last), 1):
        rounded, step = _rounded_picture(picture)
        pictures.append(
            _op("qconv2d_pointwise")(
                rounded, step, ZERO, packed, scale.float(), _zeros(scale), wide_bias,
                stride, padding, [1, 1], 1, 1.0, 0, scale.dtype, "none", [], "",
            )
        )  # fmt: skip  # as above, with the convolution's geometry
    return pictures[0] if len(pictures) == 1 else torch.cat(pictures)


def _rounded_picture(picture: Tensor) -> tuple[Tensor, float]:
    """Codes of a picture (1,C,H,W), channels_last, and their step."""
    rounded = torch.empty(picture.shape, dtype=torch.uint8, memory_format=torch.channels_last)
    rows, codes = (x.movedim(1, -1).flatten(0, 2) for x in (picture, rounded))
    smallest, largest = torch.aminmax(rows)
    step = max(float(largest), -float(smallest), _TINY) / INT8_MAX
    half = torch.full((1, 1), ZERO + 0.5)
    for part in _pieces(rows):
        codes[part] = torch.add(half, rows[part], alpha=1 / step)
    return rounded, step


def _op(name: str) -> Any:
    return getattr(torch.ops.onednn, name)


def _zeros(scale: Tensor) -> Tensor:
    return torch.zeros(len(scale), dtype=torch.int64)
