"""Norms, gates and linear attention in pieces, written over inputs that are no longer needed; without gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana_sprint.backends.cpu.strips import is_cpu_inference, over_pixels, pieces
from sana_sprint.models.layers import LINEAR_ATTENTION_EPS, wide_dtype

SILU = nn.SiLU()


def activate(activation: nn.Module, x: Tensor) -> Tensor:
    """`activation(x)` of a grid (B,C,H,W), which is written over."""
    if is_cpu_inference(x) and hasattr(activation, "inplace"):
        activation = type(activation)(inplace=True)
    return over_pixels(activation, x)


def gated(hidden: Tensor) -> Tensor:
    """The first half of the channels of a grid (B,2C,H,W), times SiLU of the second; both are written over."""
    value, gate = hidden.chunk(2, dim=1)
    return over_pixels(_gate_over if is_cpu_inference(value) else _gate, value, gate)


def _gate(value: Tensor, gate: Tensor) -> Tensor:
    return value * F.silu(gate)


def _gate_over(value: Tensor, gate: Tensor) -> Tensor:
    return value.mul_(F.silu(gate, inplace=True))


def wide_normed(x: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps)` over the last axis in fp32 or wider, in the fewest passes."""
    wide = x.to(wide_dtype(x), copy=True)
    mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    return wide.mul_(mean_square.add_(eps).rsqrt_())


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """ReLU linear attention, some tokens at a time: q, k, v (B,N,K,E) -> (B,N,K,E), rounded to v's dtype.

    Heads stay where they lie, also as parts of larger arrays: copies in another order would take as long as the products.
    """
    wide = wide_dtype(v)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    heads, width = v.shape[2:]
    for queries, keys, values, result in zip(q, k, v, out, strict=True):
        total = torch.zeros(heads, width, dtype=wide, device=v.device)
        sums = torch.zeros(heads, width, width, dtype=wide, device=v.device)
        for piece in pieces(keys):
            weights = keys[piece].to(wide, copy=True).relu_()  # (n,K,E)
            total += weights.sum(0)
            sums.baddbmm_(weights.permute(1, 2, 0), values[piece].to(wide).transpose(0, 1))
        for piece in pieces(queries):
            weights = queries[piece].to(wide, copy=True).relu_()
            denominator = torch.linalg.vecdot(weights, total).add_(LINEAR_ATTENTION_EPS).unsqueeze(-1)
            numerator = torch.bmm(weights.transpose(0, 1), sums).transpose(0, 1)  # (n,K,E)
            result[piece] = torch.div(numerator, denominator, out=weights)
    return out
