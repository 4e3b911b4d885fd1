"""Depthwise convolutions in one pass over memory each: 3x3 with the SiLU before and the gate behind it, and 5x5; needs Triton.

The widest tensor of a block, 5 D channels, is read once and never written again: activations live in registers, sums
are fp32, and the result is rounded once.
Axes: B batch, H W token grid, N = H*W tokens, C hidden channels after the gate.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # on a CPU, which has no libdevice


def gated_depthwise(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    grid: tuple[int, int],
    *,
    block_c: int = 128,
    rows: int = 16,
    num_warps: int = 2,
) -> Tensor:
    """`value * silu(gate)`, where (value | gate) is the convolution of `silu(hidden)`: (B,N,2C) -> (B,N,C).

    Args:
        hidden: tokens, row by row, contiguous.
        weight: (2C,1,3,3).
        bias: (2C,).
        grid: (H,W).
        block_c: channels that a program handles, a power of 2.
        rows: image rows that a program walks down, reading two more.
        num_warps: of 32 threads in a program.
    """
    B, N, double = hidden.shape  # noqa: N806 (axis letters)
    C, (H, W) = double // 2, grid  # noqa: N806
    taps = weight.view(double, 9).t().contiguous()  # channels side by side, as threads read them
    out = torch.empty(B, N, C, dtype=hidden.dtype, device=hidden.device)
    programs = (triton.cdiv(C, block_c), triton.cdiv(W, 4) * triton.cdiv(H, rows), B)
    _gated_depthwise[programs](
        hidden, taps, bias, out, H, W, C, block_c=block_c, rows=rows, num_warps=num_warps
    )
    return out


def depthwise5(
    x: Tensor, weight: Tensor, *, block_c: int = 128, rows: int = 32, num_warps: int = 2
) -> Tensor:
    """A convolution of each channel by itself, without bias, of the same size: (B,C,H,W), channels_last.

    Args:
        x: (B,C,H,W), channels_last.
        weight: (C,1,5,5).
        block_c, num_warps: see `gated_depthwise`.
        rows: image rows that a program walks down, reading four more.
    """
    B, C, H, W = x.shape  # noqa: N806
    taps = weight.view(C, 25).t().contiguous()
    out = torch.empty_like(x)
    programs = (triton.cdiv(C, block_c), triton.cdiv(W, 4) * triton.cdiv(H, rows), B)
    _depthwise5[programs](x, taps, out, H, W, C, block_c=block_c, rows=rows, num_warps=num_warps)
    return out


@triton.jit
def _silu(x):
    if INTERPRETED:
        return x / (1.0 + tl.exp(-x))
    # Half as many instructions: nothing is done for denormals, whose activation is as good as 0.
    return libdevice.fast_dividef(x, 1.0 + libdevice.fast_expf(-x))


@triton.jit
def _load(ptr, mask):
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _start(height, rows: tl.constexpr, block_c: tl.constexpr):
    """The start of this program: picture, first row, first of four columns; and its channels."""
    strips = tl.cdiv(height, rows)
    image = tl.program_id(2).to(tl.int64)
    first = (tl.program_id(1) % strips) * rows
    x = (tl.program_id(1) // strips) * 4
    return image, first, x, tl.program_id(0) * block_c + tl.arange(0, block_c)


@triton.jit
def _activated(ptr, step, ok, x, width):
    """Six columns from x - 1 on, activated; outside the picture they are 0, as their activation is."""
    return (
        _silu(_load(ptr - step, ok & (x > 0))),
        _silu(_load(ptr, ok)),
        _silu(_load(ptr + step, ok & (x + 1 < width))),
        _silu(_load(ptr + 2 * step, ok & (x + 2 < width))),
        _silu(_load(ptr + 3 * step, ok & (x + 3 < width))),
        _silu(_load(ptr + 4 * step, ok & (x + 4 < width))),
    )


@triton.jit
def _taps(ptr, step, ok):
    """A row of the kernel: left, middle, right."""
    return _load(ptr, ok), _load(ptr + step, ok), _load(ptr + 2 * step, ok)


@triton.jit
def _add(sums, row, taps):
    """To the sums of four columns what six columns of a row contribute through a row of the kernel."""
    return (
        sums[0] + row[0] * taps[0] + row[1] * taps[1] + row[2] * taps[2],
        sums[1] + row[1] * taps[0] + row[2] * taps[1] + row[3] * taps[2],
        sums[2] + row[2] * taps[0] + row[3] * taps[1] + row[4] * taps[2],
        sums[3] + row[3] * taps[0] + row[4] * taps[1] + row[5] * taps[2],
    )


@triton.jit
def _gated_depthwise(
    hidden_ptr,
    taps_ptr,
    bias_ptr,
    out_ptr,
    height,
    width,
    hidden,
    block_c: tl.constexpr,
    rows: tl.constexpr,
):
    """Walks down `rows` rows of four columns. Each row read adds to three rows of the result, of which the oldest is then
    complete. A thread has its channels' columns, taps and sums in registers: an activation costs more than all that is made
    of it, and every other way of meeting one's neighbours computes it three times."""
    image, first, x, channels = _start(height, rows, block_c)
    channels_ok = channels < hidden
    double = 2 * hidden

    value_top = _taps(taps_ptr + channels, double, channels_ok)
    value_middle = _taps(taps_ptr + 3 * double + channels, double, channels_ok)
    value_bottom = _taps(taps_ptr + 6 * double + channels, double, channels_ok)
    gate_top = _taps(taps_ptr + hidden + channels, double, channels_ok)
    gate_middle = _taps(taps_ptr + 3 * double + hidden + channels, double, channels_ok)
    gate_bottom = _taps(taps_ptr + 6 * double + hidden + channels, double, channels_ok)
    bias = _load(bias_ptr + channels, channels_ok)
    value_start = (bias, bias, bias, bias)
    bias = _load(bias_ptr + hidden + channels, channels_ok)
    gate_start = (bias, bias, bias, bias)
    value_above, value_here, value_below = value_start, value_start, value_start
    gate_above, gate_here, gate_below = gate_start, gate_start, gate_start
    for step in range(rows + 2):
        y = first + step - 1
        place = hidden_ptr + ((image * height + y) * width + x) * double + channels
        ok = channels_ok & (y >= 0) & (y < height)
        value = _activated(place, double, ok, x, width)
        gate = _activated(place + hidden, double, ok, x, width)
        value_below = _add(value_below, value, value_top)
        gate_below = _add(gate_below, gate, gate_top)
        value_here = _add(value_here, value, value_middle)
        gate_here = _add(gate_here, gate, gate_middle)
        value_above = _add(value_above, value, value_bottom)
        gate_above = _add(gate_above, gate, gate_bottom)
        done = y - 1
        place = out_ptr + ((image * height + done) * width + x) * hidden + channels
        ok = channels_ok & (step >= 2) & (done < height)
        for column in tl.static_range(4):
            result = value_above[column] * _silu(gate_above[column])
            inside = ok & (x + column < width)
            tl.store(place + column * hidden, result.to(out_ptr.dtype.element_ty), mask=inside)
        value_above, value_here, value_below = value_here, value_below, value_start
        gate_above, gate_here, gate_below = gate_here, gate_below, gate_start


@triton.jit
def _eight(ptr, step, ok, x, width):
    """Eight columns from x - 2 on, 0 outside the picture."""
    return (
        _load(ptr - 2 * step, ok & (x > 1)),
        _load(ptr - step, ok & (x > 0)),
        _load(ptr, ok),
        _load(ptr + step, ok & (x + 1 < width)),
        _load(ptr + 2 * step, ok & (x + 2 < width)),
        _load(ptr + 3 * step, ok & (x + 3 < width)),
        _load(ptr + 4 * step, ok & (x + 4 < width)),
        _load(ptr + 5 * step, ok & (x + 5 < width)),
    )


@triton.jit
def _five_taps(ptr, step, ok):
    """A row of the kernel, from left to right."""
    left, right = _load(ptr, ok), _load(ptr + 4 * step, ok)
    return left, _load(ptr + step, ok), _load(ptr + 2 * step, ok), _load(ptr + 3 * step, ok), right


@triton.jit
def _add_five(total, a, b, c, d, e, taps):
    return total + a * taps[0] + b * taps[1] + c * taps[2] + d * taps[3] + e * taps[4]


@triton.jit
def _add_row(sums, row, taps):
    """To the sums of four columns what eight columns of a row contribute through a row of the kernel."""
    return (
        _add_five(sums[0], row[0], row[1], row[2], row[3], row[4], taps),
        _add_five(sums[1], row[1], row[2], row[3], row[4], row[5], taps),
        _add_five(sums[2], row[2], row[3], row[4], row[5], row[6], taps),
        _add_five(sums[3], row[3], row[4], row[5], row[6], row[7], taps),
    )


@triton.jit
def _depthwise5(x_ptr, taps_ptr, out_ptr, height, width, dim, block_c: tl.constexpr, rows: tl.constexpr):
    """Walks down four columns as `_gated_depthwise` does; a row read adds to five rows of the result."""
    image, first, x, channels = _start(height, rows, block_c)
    channels_ok = channels < dim

    tap = taps_ptr + channels
    taps0 = _five_taps(tap, dim, channels_ok)
    taps1 = _five_taps(tap + 5 * dim, dim, channels_ok)
    taps2 = _five_taps(tap + 10 * dim, dim, channels_ok)
    taps3 = _five_taps(tap + 15 * dim, dim, channels_ok)
    taps4 = _five_taps(tap + 20 * dim, dim, channels_ok)
    zero = tl.zeros((block_c,), tl.float32)
    nothing = (zero, zero, zero, zero)
    sums0, sums1, sums2, sums3, sums4 = nothing, nothing, nothing, nothing, nothing  # the oldest first
    for step in range(rows + 4):
        y = first + step - 2
        place = x_ptr + ((image * height + y) * width + x) * dim + channels
        row = _eight(place, dim, channels_ok & (y >= 0) & (y < height), x, width)
        sums0 = _add_row(sums0, row, taps4)
        sums1 = _add_row(sums1, row, taps3)
        sums2 = _add_row(sums2, row, taps2)
        sums3 = _add_row(sums3, row, taps1)
        sums4 = _add_row(sums4, row, taps0)
        done = y - 2
        place = out_ptr + ((image * height + done) * width + x) * dim + channels
        ok = channels_ok & (step >= 4) & (done < height)
        for column in tl.static_range(4):
            result = sums0[column].to(out_ptr.dtype.element_ty)
            tl.store(place + column * dim, result, mask=ok & (x + column < width))
        sums0, sums1, sums2, sums3, sums4 = sums1, sums2, sums3, sums4, nothing
