"""The operations of a decoder between its convolutions, each in one pass over memory; needs Triton.

Pixels are rows of channels: grids are channels_last. Whatever the dtype of the tensors (bf16, fp16 or fp32), sums and
products are fp32 and the result is rounded once. Axes: B batch, C channels, H W grid, M = B*H*W pixels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana_sprint.backends.cuda.kernels.convolution import _silu

_TILE = 4096  # numbers that a program holds at a time


def rms_norm(
    change: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    add_to: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """`add_to + weight * change / sqrt(mean(change^2) + eps) + bias`, over the channels of each pixel.

    change, add_to: (B,C,H,W), channels_last; weight, bias: (C,); relu: make what is negative 0.
    """
    C = change.shape[1]  # noqa: N806 (axis letters)
    pixels = change.numel() // C
    block_c = triton.next_power_of_2(C)
    block_m = max(1, _TILE // block_c)
    out = torch.empty_like(change)
    _rms_norm[(triton.cdiv(pixels, block_m),)](
        change,
        change if add_to is None else add_to,
        weight,
        bias,
        out,
        pixels,
        C,
        eps,
        adds=add_to is not None,
        relu=relu,
        block_m=block_m,
        block_c=block_c,
        num_warps=8,
    )
    return out


def silu(x: Tensor, bias: Tensor) -> Tensor:
    """`silu(x + bias)` written over x (B,C,H,W), channels_last; bias (C,).

    A convolution's own bias would be another pass.
    """
    C = x.shape[1]  # noqa: N806 (axis letters)
    block_c = triton.next_power_of_2(C)
    block_m = max(1, _TILE // block_c)
    pixels = x.numel() // C
    _biased_silu[(triton.cdiv(pixels, block_m),)](
        x, bias, pixels, C, block_m=block_m, block_c=block_c, num_warps=8
    )
    return x


def interleave(phases: Tensor, bias: Tensor | None, x: Tensor | None, repeats: int) -> Tensor:
    """The four phases of `cpu.subpixel` in their places, plus the shortcut of their input: (B,C,2H,2W).

    phases (B,4C,H+1,W+1), phase by phase, each from its own first row and column on; bias (C,); x (B,I,H,W), each channel
    of which is added `repeats` times in a row, shuffled into pixels. Grids are channels_last.
    """
    B, quadruple, H, W = phases.shape[0], phases.shape[1], phases.shape[2] - 1, phases.shape[3] - 1  # noqa: N806
    C = quadruple // 4  # noqa: N806
    out = torch.empty(
        (B, C, 2 * H, 2 * W), dtype=phases.dtype, device=phases.device, memory_format=torch.channels_last
    )
    block_c = min(128, triton.next_power_of_2(C))
    block_w = _TILE // block_c
    programs = (triton.cdiv(2 * W, block_w), 2 * H, B * triton.cdiv(C, block_c))
    _interleave[programs](
        phases,
        phases if bias is None else bias,
        phases if x is None else x,
        out,
        H,
        W,
        C,
        0 if x is None else x.shape[1],
        repeats,
        has_bias=bias is not None,
        adds=x is not None,
        block_w=block_w,
        block_c=block_c,
        num_warps=8,
    )
    return out


@triton.jit
def _rms_norm(
    change_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    pixels,
    dim,
    eps,
    adds: tl.constexpr,
    relu: tl.constexpr,
    block_m: tl.constexpr,
    block_c: tl.constexpr,
):
    pixel = tl.program_id(0).to(tl.int64) * block_m + tl.arange(0, block_m)
    channels = tl.arange(0, block_c)
    channels_ok = channels < dim
    ok = (pixel < pixels)[:, None] & channels_ok[None, :]
    place = pixel[:, None] * dim + channels[None, :]
    change = tl.load(change_ptr + place, mask=ok, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + channels, mask=channels_ok, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channels, mask=channels_ok, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(change * change, 1) / dim + eps)
    out = change * inverse[:, None] * weight[None, :] + bias[None, :]
    if adds:
        out += tl.load(x_ptr + place, mask=ok, other=0.0).to(tl.float32)
    if relu:
        out = tl.where(out < 0.0, 0.0, out)  # NaN stays NaN, so that it is found
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _biased_silu(x_ptr, bias_ptr, pixels, dim, block_m: tl.constexpr, block_c: tl.constexpr):
    pixel = tl.program_id(0).to(tl.int64) * block_m + tl.arange(0, block_m)
    channels = tl.arange(0, block_c)
    ok = (pixel < pixels)[:, None] & (channels < dim)[None, :]
    place = x_ptr + pixel[:, None] * dim + channels[None, :]
    bias = tl.load(bias_ptr + channels, mask=channels < dim, other=0.0).to(tl.float32)
    x = tl.load(place, mask=ok, other=0.0).to(tl.float32) + bias[None, :]
    tl.store(place, _silu(x).to(x_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _interleave(
    phases_ptr,
    bias_ptr,
    x_ptr,
    out_ptr,
    height,
    width,
    dim: tl.constexpr,
    inputs: tl.constexpr,
    repeats: tl.constexpr,
    has_bias: tl.constexpr,
    adds: tl.constexpr,
    block_w: tl.constexpr,
    block_c: tl.constexpr,
):
    """Part of a row of the result. Places inside a row fit 32 bits; sizes that are known save dividing by them."""
    pieces: tl.constexpr = (dim + block_c - 1) // block_c
    image = (tl.program_id(2) // pieces).to(tl.int64)
    first = (tl.program_id(2) % pieces) * block_c
    channels = first + tl.arange(0, block_c)
    row = tl.program_id(1)
    a, i = row % 2, row // 2
    columns = tl.program_id(0) * block_w + tl.arange(0, block_w)
    b, j = columns % 2, columns // 2
    ok = (columns < 2 * width)[:, None] & (channels < dim)[None, :]
    source = phases_ptr + ((image * (height + 1) + i + a) * (width + 1) * 4 + 2 * a) * dim
    place = ((j + b) * 4 + b) * dim
    out = tl.load(source + place[:, None] + channels[None, :], mask=ok, other=0.0).to(tl.float32)
    if has_bias:
        out += tl.load(bias_ptr + channels, mask=channels < dim, other=0.0).to(tl.float32)[None, :]
    if adds:
        source = x_ptr + (image * height + i) * width * inputs + (j * inputs)[:, None]
        if repeats == 4:  # the common numbers are read side by side
            near = tl.load(source + channels[None, :], mask=ok, other=0.0)
        elif repeats == 2:
            both = 2 * first + tl.arange(0, 2 * block_c)
            pair = tl.load(
                source + both[None, :],
                mask=(columns < 2 * width)[:, None] & (both < inputs)[None, :],
                other=0.0,
            )
            even, odd = tl.split(tl.reshape(pair, (block_w, block_c, 2)))
            near = tl.where(a == 0, even, odd)
        else:
            place = (4 * channels[None, :] + (2 * a + b)[:, None]) // repeats
            near = tl.load(source + place, mask=ok, other=0.0)
        out += near.to(tl.float32)
    target = out_ptr + (image * 2 * height + row) * 2 * width * dim
    place = columns[:, None] * dim + channels[None, :]
    tl.store(target + place, out.to(out_ptr.dtype.element_ty), mask=ok)
