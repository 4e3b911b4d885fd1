"""Layers of the transformer that work in pieces where arrays are large; elsewhere they are the plain ones.

Without gradients on a CPU, that is; see `strips`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sana_sprint.backends.cpu.pointwise import SILU, activate, attend, gated, wide_normed
from sana_sprint.backends.cpu.strips import is_cpu_inference, needs_pieces, over_rows
from sana_sprint.backends.swap import Classes
from sana_sprint.models import layers
from sana_sprint.models.layers import pointwise


class RMSNorm(layers.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        if not needs_pieces(x):
            return super().forward(x)
        return over_rows(self._wide, x, out=torch.empty_like(x, dtype=self.weight.dtype))

    def _wide(self, x: Tensor) -> Tensor:
        """Before it is rounded."""
        wide = wide_normed(x, self.eps)
        return wide.mul_(self.weight.to(wide.dtype))


class LinearSelfAttention(layers.LinearSelfAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """In v's dtype, rather than fp32, where it works in pieces."""
        if not needs_pieces(v):
            return super().attend(q, k, v)
        q, k, v = (torch.unflatten(x, -1, (self.num_heads, -1)) for x in (q, k, v))
        return attend(q, k, v).flatten(2)


class GatedConvFeedForward(layers.GatedConvFeedForward):
    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if not is_cpu_inference(x):
            return super().forward(x, grid)
        hidden = torch.unflatten(pointwise(self.conv_inverted, x), 1, grid).permute(0, 3, 1, 2)
        image = self.conv_depth(activate(SILU, hidden))  # (B,5D,H,W), channels_last
        return pointwise(self.conv_point, gated(image).permute(0, 2, 3, 1).flatten(1, 2))


CLASSES: Classes = {
    layers.RMSNorm: RMSNorm,
    layers.LinearSelfAttention: LinearSelfAttention,
    layers.GatedConvFeedForward: GatedConvFeedForward,
}
