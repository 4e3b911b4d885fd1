"""A transformer block by fused kernels: the same weights, the same roundings or fewer, a third of the launches.

Matrix products and softmax attention stay torch's; between them every tensor is read and written once. A block whose
tensors the kernels are not for (see `applies`) runs as always.
Axes: B batch, N image tokens, L text tokens, D width, K heads, E head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana_sprint.backends.cuda import device
from sana_sprint.backends.cuda.device import DTYPES, LARGEST_HEAD_DIM, on_device
from sana_sprint.backends.explicit_attention import has_fused_attention
from sana_sprint.backends.swap import Classes
from sana_sprint.models import transformer
from sana_sprint.models.layers import (
    FP16_MAX,
    LINEAR_ATTENTION_EPS,
    CrossAttention,
    GatedConvFeedForward,
    LinearSelfAttention,
    RMSNorm,
    merge_heads,
    pointwise,
    product_dtype,
    split_heads,
)


def applies(block: transformer.SanaTransformerBlock, x: Tensor) -> bool:
    """Whether kernels can stand for the block: inference on an Ampere GPU or later, outside autocast and torch.compile.

    Compiled code is traced through the plain path, for which inductor makes kernels of its own.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and x.dtype in DTYPES
        and x.dtype == block.scale_shift_table.dtype == product_dtype(block.scale_shift_table)
        and not block.norm2.elementwise_affine
        and has_fused_attention(block)
        and x.shape[-1] <= LARGEST_HEAD_DIM * block.attn1.num_heads
        and device.runs_on(x.device)
    )


class SanaTransformerBlock(transformer.SanaTransformerBlock):
    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        grid: tuple[int, int],
    ) -> Tensor:
        if not applies(self, x):
            return super().forward(x, modulation, key, value, bias, grid)
        with on_device(x):
            return _run(self, x, modulation, key, value, bias, grid)


CLASSES: Classes = {transformer.SanaTransformerBlock: SanaTransformerBlock}


def _run(
    block: SanaTransformerBlock,
    x: Tensor,
    modulation: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    grid: tuple[int, int],
) -> Tensor:
    from sana_sprint.backends.cuda.kernels.norms import gated_sum, modulated_norm

    parts = block.scale_shift_table + modulation  # (B,6,D)
    shift1, scale1, gate1, shift2, scale2, gate2 = parts.unbind(1)
    x, normed = modulated_norm(x.contiguous(), shift1, scale1, block.norm1.eps)
    x = gated_sum(x, gate1, _self_attention(block.attn1, normed))
    crossed = _cross_attention(block.attn2, x, key, value, bias)
    x, normed = modulated_norm(x, shift2, scale2, block.norm2.eps, delta=crossed)
    return gated_sum(x, gate2, _feed_forward(block.ff, normed, grid))


def _self_attention(layer: LinearSelfAttention, x: Tensor) -> Tensor:
    from sana_sprint.backends.cuda.kernels.attention import linear_attention

    q, k = layer.norm_q, layer.norm_k
    norms = (q.weight, k.weight, q.eps) if isinstance(q, RMSNorm) and isinstance(k, RMSNorm) else None
    out = linear_attention(
        layer.to_q(x),
        layer.to_k(x),
        layer.to_v(x),
        layer.num_heads,
        eps=LINEAR_ATTENTION_EPS,
        norms=norms,
    )
    out = layer.project_out(out)
    return out.clamp(-FP16_MAX, FP16_MAX) if out.dtype == torch.float16 else out


def _cross_attention(
    layer: CrossAttention, x: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> Tensor:
    q = split_heads(_normed(layer.norm_q, layer.to_q(x)), layer.num_heads)
    mask = None if bias is None else bias.to(key.dtype)
    return layer.project_out(merge_heads(F.scaled_dot_product_attention(q, key, value, attn_mask=mask)))


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    from sana_sprint.backends.cuda.kernels.norms import rms_norm

    if isinstance(norm, RMSNorm):
        return rms_norm(x, norm.weight, norm.eps)
    out: Tensor = norm(x)
    return out


def _feed_forward(layer: GatedConvFeedForward, x: Tensor, grid: tuple[int, int]) -> Tensor:
    from sana_sprint.backends.cuda.kernels.convolution import gated_depthwise

    hidden = pointwise(layer.conv_inverted, x)
    bias = layer.conv_depth.bias
    assert bias is not None
    return pointwise(layer.conv_point, gated_depthwise(hidden, layer.conv_depth.weight, bias, grid))
