"""Norms over a token's channels, and gates, in one pass over memory each; needs Triton.

Whatever the dtype of the tensors (bf16, fp16 or fp32), sums and products are fp32 and the result is rounded once.
Axes: B batch, N tokens, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def modulated_norm(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, delta: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`x + delta`, and its layer norm times `1 + scale` plus `shift`; without delta x itself comes first.

    x, delta (B,N,D) contiguous; shift, scale (B,D) with channels side by side and the same stride.
    """
    B, N, D = x.shape  # noqa: N806 (axis letters)
    assert shift.stride() == scale.stride()
    total = x if delta is None else torch.empty_like(x)
    out = torch.empty_like(x)
    _modulated_norm[(B * N,)](
        x,
        x if delta is None else delta,
        shift,
        scale,
        total,
        out,
        N,
        D,
        shift.stride(0),
        eps,
        has_delta=delta is not None,
        block=triton.next_power_of_2(D),
        num_warps=8,
    )
    return total, out


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """`(weight + offset) * x / sqrt(mean(x^2) + eps)` over the last axis of x (B,N,D), contiguous."""
    D = x.shape[-1]  # noqa: N806
    out = torch.empty_like(x)
    block = triton.next_power_of_2(D)
    _rms_norm[(x.numel() // D,)](x, weight, out, D, eps, offset, block=block, num_warps=8)
    return out


def inverse_rms(q: Tensor, k: Tensor, eps: float) -> Tensor:
    """`1 / sqrt(mean(x^2) + eps)` of every token of q and of k, each (B,N,D) contiguous: (2,B,N) fp32."""
    B, N, D = q.shape  # noqa: N806
    out = torch.empty(2, B, N, dtype=torch.float32, device=q.device)
    _inverse_rms[(B * N, 2)](q, k, out, B * N, D, eps, block=triton.next_power_of_2(D), num_warps=8)
    return out


def gated_sum(x: Tensor, gate: Tensor, change: Tensor) -> Tensor:
    """`x + gate * change`: x, change (B,N,D) contiguous, gate (B,D) with channels side by side."""
    B, N, D = x.shape  # noqa: N806
    out = torch.empty_like(x)
    block_n, block_d = 16, 256
    _gated_sum[(triton.cdiv(N, block_n), triton.cdiv(D, block_d), B)](
        x, gate, change, out, N, D, gate.stride(0), block_n=block_n, block_d=block_d, num_warps=4
    )
    return out


@triton.jit
def _modulated_norm(
    x_ptr,
    delta_ptr,
    shift_ptr,
    scale_ptr,
    total_ptr,
    out_ptr,
    tokens,
    dim,
    modulation_stride,
    eps,
    has_delta: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, block)
    mask = channels < dim
    x = tl.load(x_ptr + row * dim + channels, mask=mask, other=0.0).to(tl.float32)
    if has_delta:
        x += tl.load(delta_ptr + row * dim + channels, mask=mask, other=0.0).to(tl.float32)
        # What the next layers read is what is normalised: the rounded sum.
        rounded = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * dim + channels, rounded, mask=mask)
        x = rounded.to(tl.float32)
    mean = tl.sum(x, 0) / dim
    centred = tl.where(mask, x - mean, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / dim + eps)
    place = (row // tokens) * modulation_stride + channels
    shift = tl.load(shift_ptr + place, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + place, mask=mask, other=0.0).to(tl.float32)
    out = normed * (1.0 + scale) + shift
    tl.store(out_ptr + row * dim + channels, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm(x_ptr, weight_ptr, out_ptr, dim, eps, offset, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, block)
    mask = channels < dim
    x = tl.load(x_ptr + row * dim + channels, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + channels, mask=mask, other=0.0).to(tl.float32)
    out = x * tl.rsqrt(tl.sum(x * x, 0) / dim + eps) * (weight + offset)
    tl.store(out_ptr + row * dim + channels, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _inverse_rms(q_ptr, k_ptr, out_ptr, rows, dim, eps, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, block)
    mask = channels < dim
    is_key = tl.program_id(1)
    x_ptr = q_ptr
    if is_key == 1:
        x_ptr = k_ptr
    x = tl.load(x_ptr + row * dim + channels, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + is_key * rows + row, tl.rsqrt(tl.sum(x * x, 0) / dim + eps))


@triton.jit
def _gated_sum(
    x_ptr,
    gate_ptr,
    change_ptr,
    out_ptr,
    tokens,
    dim,
    gate_stride,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
):
    token = tl.program_id(0) * block_n + tl.arange(0, block_n)
    channels = tl.program_id(1) * block_d + tl.arange(0, block_d)
    image = tl.program_id(2).to(tl.int64)
    ok = (token < tokens)[:, None] & (channels < dim)[None, :]
    gate = tl.load(gate_ptr + image * gate_stride + channels, mask=channels < dim, other=0.0).to(tl.float32)
    start = image * tokens * dim
    place = token[:, None] * dim + channels[None, :]
    x = tl.load(x_ptr + start + place, mask=ok, other=0.0).to(tl.float32)
    change = tl.load(change_ptr + start + place, mask=ok, other=0.0).to(tl.float32)
    out = x + gate[None, :] * change
    tl.store(out_ptr + start + place, out.to(out_ptr.dtype.element_ty), mask=ok)
