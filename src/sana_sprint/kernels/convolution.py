"""SiLU, depthwise 3x3 convolution with bias, and gate, in one pass over the tokens; needs Triton.

The widest tensor of a block, 5 D channels, is read once and never written again: activations live in registers, sums
are fp32, and the result is rounded once.
Axes: B batch, H W token grid, N = H*W tokens, C hidden channels after the gate.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def gated_depthwise(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    grid: tuple[int, int],
    *,
    block_w: int = 8,
    block_c: int = 64,
    rows: int = 8,
    num_warps: int = 4,
) -> Tensor:
    """`value * silu(gate)`, where (value | gate) is the convolution of `silu(hidden)`: (B,N,2C) -> (B,N,C).

    Args:
        hidden: tokens, row by row, contiguous.
        weight: (2C,1,3,3).
        bias: (2C,).
        grid: (H,W).
        block_w, block_c: columns and channels that a program handles, powers of 2.
        rows: image rows that a program walks down, reading two more.
        num_warps: of 32 threads in a program.
    """
    B, N, double = hidden.shape  # noqa: N806 (axis letters)
    C, (H, W) = double // 2, grid  # noqa: N806
    taps = weight.view(double, 9).t().contiguous()  # channels side by side, as threads read them
    out = torch.empty(B, N, C, dtype=hidden.dtype, device=hidden.device)
    programs = (triton.cdiv(W, block_w), triton.cdiv(C, block_c) * triton.cdiv(H, rows), B)
    _gated_depthwise[programs](
        hidden, taps, bias, out, H, W, C, block_w=block_w, block_c=block_c, rows=rows, num_warps=num_warps
    )
    return out


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _load(ptr, mask):
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _gated_depthwise(
    hidden_ptr,
    taps_ptr,
    bias_ptr,
    out_ptr,
    height,
    width,
    hidden,
    block_w: tl.constexpr,
    block_c: tl.constexpr,
    rows: tl.constexpr,
):
    """Walks down `rows` rows. Each row read adds to three rows of the result, of which the oldest is then complete."""
    strips = tl.cdiv(height, rows)
    image = tl.program_id(2).to(tl.int64)
    first = (tl.program_id(1) % strips) * rows
    columns = tl.program_id(0) * block_w + tl.arange(0, block_w)
    channels = (tl.program_id(1) // strips) * block_c + tl.arange(0, block_c)
    channels_ok = channels < hidden
    double = 2 * hidden

    zero = tl.zeros((block_w, block_c), tl.float32)
    value_start = zero + _load(bias_ptr + channels, channels_ok)[None, :]
    gate_start = zero + _load(bias_ptr + hidden + channels, channels_ok)[None, :]
    value_above, value_here, value_below = value_start, value_start, value_start
    gate_above, gate_here, gate_below = gate_start, gate_start, gate_start
    for step in range(rows + 2):
        y = first + step - 1
        for dx in tl.static_range(3):
            x = columns + (dx - 1)
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            ok = inside[:, None] & channels_ok[None, :]
            place = ((image * height + y) * width + x)[:, None] * double + channels[None, :]
            value = _silu(_load(hidden_ptr + place, ok))
            gate = _silu(_load(hidden_ptr + place + hidden, ok))
            tap = taps_ptr + dx * double + channels
            value_below += value * _load(tap, channels_ok)[None, :]
            gate_below += gate * _load(tap + hidden, channels_ok)[None, :]
            value_here += value * _load(tap + 3 * double, channels_ok)[None, :]
            gate_here += gate * _load(tap + 3 * double + hidden, channels_ok)[None, :]
            value_above += value * _load(tap + 6 * double, channels_ok)[None, :]
            gate_above += gate * _load(tap + 6 * double + hidden, channels_ok)[None, :]
        done = y - 1
        place = ((image * height + done) * width + columns)[:, None] * hidden + channels[None, :]
        ok = (step >= 2) & (done < height) & (columns < width)[:, None] & channels_ok[None, :]
        result = value_above * _silu(gate_above)
        tl.store(out_ptr + place, result.to(out_ptr.dtype.element_ty), mask=ok)
        value_above, value_here, value_below = value_here, value_below, value_start
        gate_above, gate_here, gate_below = gate_here, gate_below, gate_start
