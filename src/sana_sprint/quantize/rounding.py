"""Triton kernels that round rows to 8 bits and rescale sums, each in one pass over memory.

Plain operations read and write a tensor six times for this, which takes longer than the products save.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# 1.5 * 2^23: adding and subtracting it rounds fp32 to whole numbers, ties to even.
_MAGIC = tl.constexpr(12582912.0)


def round_rows(x: Tensor, dtype: torch.dtype, largest: float, smallest: float) -> tuple[Tensor, Tensor]:
    """Each row of x (M,K) divided by its step, so that its largest number is `largest`, and rounded: codes and steps (M,1).

    dtype: int8 or float8_e4m3fn. smallest: a lower bound of a row's largest number, which keeps its step defined.
    """
    rows, width = x.shape
    codes = torch.empty(rows, width, dtype=dtype, device=x.device)
    step = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    _round_rows[(rows,)](
        x,
        codes,
        step,
        width,
        x.stride(0),
        largest,
        smallest,
        is_whole=dtype == torch.int8,
        block=block,
        num_warps=min(8, max(1, block // 512)),
    )
    return codes, step


def scale_sums(sums: Tensor, step: Tensor, scale: Tensor) -> Tensor:
    """`sums * step * scale` in the scale's dtype: sums (M,N) int32, step (M,1) fp32, scale (N,)."""
    rows, width = sums.shape
    out = torch.empty(rows, width, dtype=scale.dtype, device=sums.device)
    block = min(1024, triton.next_power_of_2(width))
    _scale_sums[(rows, triton.cdiv(width, block))](sums, step, scale, out, width, block=block)
    return out


@triton.jit
def _round_rows(
    x_ptr, codes_ptr, step_ptr, width, stride, largest, smallest, is_whole: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    ok = columns < width
    x = tl.load(x_ptr + row * stride + columns, mask=ok, other=0.0).to(tl.float32)
    step = tl.maximum(tl.max(tl.abs(x), 0), smallest) / largest
    scaled = x / step
    if is_whole:
        scaled = (scaled + _MAGIC) - _MAGIC
    scaled = tl.minimum(tl.maximum(scaled, -largest), largest)
    tl.store(codes_ptr + row * width + columns, scaled.to(codes_ptr.dtype.element_ty), mask=ok)
    tl.store(step_ptr + row, step)


@triton.jit
def _scale_sums(sums_ptr, step_ptr, scale_ptr, out_ptr, width, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    ok = columns < width
    step = tl.load(step_ptr + row)
    scale = tl.load(scale_ptr + columns, mask=ok, other=0.0).to(tl.float32)
    out = tl.load(sums_ptr + row * width + columns, mask=ok, other=0).to(tl.float32) * step * scale
    tl.store(out_ptr + row * width + columns, out.to(out_ptr.dtype.element_ty), mask=ok)
