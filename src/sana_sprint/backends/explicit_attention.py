"""Cross-attention in plain fp32 operations, for which forward-mode differentiation has rules; the fused kernel has none.

Its backward pass is also the faster one on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sana_sprint.backends.swap import Classes, inverse, swap
from sana_sprint.models import layers
from sana_sprint.models.layers import autocast_off, wide_dtype
from sana_sprint.models.transformer import SanaTransformerBlock


class CrossAttention(layers.CrossAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        wide = wide_dtype(q)
        with autocast_off(q.device):
            scores = (q.to(wide) * q.shape[-1] ** -0.5) @ k.to(wide).transpose(-1, -2)  # (B,K,N,L)
            if bias is not None:
                scores = scores + bias.to(wide)
            return torch.softmax(scores, dim=-1) @ v.to(wide)


CLASSES: Classes = {layers.CrossAttention: CrossAttention}


def set_fused_attention(blocks: Iterable[nn.Module], fused: bool) -> None:
    """True (as models are made): the fused cross-attention kernel in these blocks. False: the operations above."""
    for block in blocks:
        swap(block, inverse(CLASSES) if fused else CLASSES)


def has_fused_attention(block: SanaTransformerBlock) -> bool:
    """Whether a block's cross-attention is the fused kernel."""
    return not isinstance(block.attn2, CrossAttention)
