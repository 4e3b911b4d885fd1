"""Matrix products and convolutions of rounded activations with rounded weights, on the device's 8-bit units.

Activations are rounded per row (token or pixel) or per picture, never over a batch: a picture does not depend on its
neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from sana_sprint import torch_private
from sana_sprint.backends.cpu.strips import pieces
from sana_sprint.quantize.formats import FP8, FP8_MAX, INT8_MAX

# Added to a number in fp32, whose last bit then stands for 1, it rounds it, and leaves its code as the lowest byte. Torch
# has no vector instructions for fp32 to unsigned bytes.
_TO_CODES = float(2**23 + torch_private.ZERO)
_TINY = 1e-30  # keeps the scale of a row of zeros defined
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
_FEWEST_ROWS = 32  # a GPU's product takes no fewer than 17


def int8_rows(
    x: Tensor, codes: Tensor, packed: Tensor | None, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`x @ weight.T + bias` for rows x (M, inputs), codes (outputs, inputs), scale and bias (outputs,); in the scale's dtype."""
    if packed is not None:
        return _cpu_rows(x, packed, scale, bias)
    out = _int8_rows(x, codes, scale)
    return out if bias is None else out + bias


def _int8_rows(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """With the int8 product that torch has on every device."""
    few = _FEWEST_ROWS - len(x)
    x, rows = (F.pad(x, (0, 0, 0, few)) if few > 0 else x), len(x)
    if _has_kernels(x):
        from sana_sprint.quantize.rounding import round_rows, scale_sums

        with torch.cuda.device(x.device):  # Triton launches on the current device
            rounded, step = round_rows(x, torch.int8, INT8_MAX, _TINY)
            return scale_sums(torch_private.int8_product(rounded, codes.t()), step, scale)[:rows]
    step = _step(x, INT8_MAX)
    sums = torch_private.int8_product((x / step).round_().to(torch.int8), codes.t())
    return (sums * step * scale.float()).to(scale.dtype)[:rows]


def _step(x: Tensor, largest: float) -> Tensor:
    """The divisor of each row, (M,1) fp32."""
    return _largest(x).clamp_min(_TINY) / largest


def _largest(x: Tensor) -> Tensor:
    """Row-wise absolute maximum, (M,1) fp32, compared as integers: the same order, five times faster."""
    kind = _BITS[x.element_size()]
    bits = x.view(kind).bitwise_and(torch.iinfo(kind).max)
    return bits.amax(1, keepdim=True).view(x.dtype).float()


def _has_kernels(x: Tensor) -> bool:
    return x.is_cuda and not torch.compiler.is_compiling() and x.stride(1) == 1 and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _cpu_rows(x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Rounds and rescales in pieces that stay in a core's cache: see `backends.cpu.strips`."""
    rounded = torch.empty(x.shape, dtype=torch.uint8)
    steps = torch.empty(len(x), 1, dtype=scale.dtype)
    for rows in pieces(x):
        steps[rows] = step = _held(_step(x[rows], INT8_MAX), scale.dtype)
        wide = x[rows].to(torch.float32, copy=True)
        rounded[rows] = wide.mul_(step.reciprocal()).add_(_TO_CODES).view(torch.int32)
    out = torch_private.linear(rounded, packed, scale)
    for rows in pieces(out):
        if bias is None:
            out[rows].mul_(steps[rows])
        else:
            torch.addcmul(bias.detach(), out[rows], steps[rows], out=out[rows])
    return out


def _held(step: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded up to a value representable in `dtype`, so that rescaling stays in that dtype."""
    if dtype != torch.bfloat16:
        return step
    return step.view(torch.int32).add(0xFFFF).bitwise_and_(-0x10000).view(torch.float32)


def fp8_rows(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """As `int8_rows` in float8_e4m3; bf16 is the only result the kernel has for scales per row."""
    if _has_kernels(x):
        from sana_sprint.quantize.rounding import round_rows

        with torch.cuda.device(x.device):
            rounded, step = round_rows(x, FP8, FP8_MAX, _TINY)
    else:
        step = _step(x, FP8_MAX)
        rounded = (x / step).clamp_(-FP8_MAX, FP8_MAX).to(FP8)
    product = torch_private.fp8_product(rounded, codes.view(FP8).t(), step, scale.float()[None])
    return product.to(scale.dtype)


def int8_convolution(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, stride: list[int], padding: Sequence[int]
) -> Tensor:
    """Convolution of pictures x (B,C,H,W), each rounded on its own; in the scale's dtype, channels_last.

    One picture at a time: the kernel then multiplies by the picture's scale itself, and at sizes that take any time
    a batch gains nothing.
    """
    wide_bias = None if bias is None else bias.detach().float()
    pictures = []
    for picture in torch.split(x.contiguous(memory_format=torch.channels_last), 1):
        rounded, step = _rounded_picture(picture, padding)
        pictures.append(torch_private.convolution(rounded, step, packed, scale, wide_bias, stride))
    return pictures[0] if len(pictures) == 1 else torch.cat(pictures)


def _rounded_picture(picture: Tensor, padding: Sequence[int]) -> tuple[Tensor, float]:
    """Codes of a picture (1,C,H,W), channels_last, with `padding` rows and columns of zeros around it, and their step."""
    _, channels, height, width = picture.shape
    top, left = padding
    size = (1, channels, height + 2 * top, width + 2 * left)
    rounded = torch.empty(size, dtype=torch.uint8, memory_format=torch.channels_last)
    codes, pixels = (grid[0].permute(1, 2, 0) for grid in (rounded, picture))
    for margin in (codes[:top], codes[top + height :], codes[:, :left], codes[:, left + width :]):
        margin.fill_(torch_private.ZERO)
    inside = codes[top : top + height, left : left + width]
    smallest, largest = torch.aminmax(pixels)
    step = max(float(largest), -float(smallest), _TINY) / INT8_MAX
    to_codes = torch.full((1, 1, 1), _TO_CODES)
    for rows in pieces(pixels):
        inside[rows] = torch.add(to_codes, pixels[rows], alpha=1 / step).view(torch.int32)
    return rounded, step
