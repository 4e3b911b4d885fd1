"""Blocks of the autoencoder that save memory and operations without gradients; with gradients they are the plain ones.

On a CPU, 3x3 convolutions of many channels are Winograd's (`winograd`), big grids are evaluated in strips of rows and in
pieces (`strips`, `pointwise`), and blocks write over an input that nobody else needs. On every device, upsampling is
convolved on the small grid (`subpixel`), and the shortcuts of `DownBlock` take fewer passes, with gradients too.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana_sprint.backends.cpu import pointwise, subpixel, winograd
from sana_sprint.backends.cpu.pointwise import SILU, activate, gated, wide_normed
from sana_sprint.backends.cpu.strips import (
    by_strips,
    convolve_rows,
    is_inference,
    needs_pieces,
    needs_strips,
    over_pixels,
    window_rows,
)
from sana_sprint.backends.swap import Classes, HasWeightCache
from sana_sprint.models import autoencoder, dc_blocks


class ChannelRMSNorm(dc_blocks.ChannelRMSNorm):
    def wide_pixels(self, x: Tensor) -> Tensor:
        """`pixels` in fewer passes over memory, before it is rounded: in fp32 or wider."""
        wide = wide_normed(x, self.eps)
        return torch.addcmul(self.bias.to(wide.dtype), wide, self.weight.to(wide.dtype), out=wide)

    def add(self, change: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
        """`x + norm(change)`, see `add_normed`."""
        if needs_pieces(change):
            return over_pixels(lambda change, x: self.wide_pixels(change).add_(x), change, x, out=out)
        return over_pixels(lambda change, x: x + self.pixels(change), change, x, out=out)

    def activated(self, x: Tensor, activation: nn.Module) -> Tensor:
        """`activation(norm(x))`; x is written over."""
        norm = self.wide_pixels if needs_pieces(x) else self.pixels
        return over_pixels(lambda x: activation(norm(x)), x)


def add_normed(norm: nn.Module, change: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """`x + norm(change)`, into `out` if given, which may be x; `change` is written over."""
    if isinstance(norm, ChannelRMSNorm):
        return norm.add(change, x, out)
    total: Tensor = x + norm(change)
    return total if out is None else out.copy_(total)


class Stage(dc_blocks.Stage):
    def forward(self, x: Tensor) -> Tensor:
        """x is written over."""
        for block in self:
            x = block(x, may_overwrite=True) if isinstance(block, ResBlock) else block(x)
        return x


class ResBlock(HasWeightCache, dc_blocks.ResBlock):
    def forward(self, x: Tensor, *, may_overwrite: bool = False) -> Tensor:
        by_winograd = all(winograd.pays(conv, x) for conv in (self.conv1, self.conv2))
        if by_winograd or needs_strips(x, x.shape[1]):
            rows = partial(self._rows, by_winograd)
            return by_strips(rows, x, x.shape[1], margin=2, may_overwrite=may_overwrite)
        if not is_inference(x):
            self.clear()
        return add_normed(self.norm, self.conv2(self.hidden(x)), x)

    def hidden(self, x: Tensor) -> Tensor:
        """The first convolution, activated."""
        return activate(self.nonlinearity, self.conv1(x))

    def _rows(self, by_winograd: bool, x: Tensor, first: int, last: int, out: Tensor) -> None:
        """Rows first to last - 1 of the result."""
        convolve = _winograd_rows if by_winograd else convolve_rows
        top = max(0, first - 1)
        hidden = convolve(self.conv1, x, top, min(last + 1, x.shape[2]))
        hidden = activate(self.nonlinearity, hidden)
        change = convolve(self.conv2, hidden, first - top, last - top)
        add_normed(self.norm, change, x[:, :, first:last], out)

    def clear(self) -> None:
        for conv in (self.conv1, self.conv2):
            winograd.cached_kernels.clear(conv)


def _winograd_rows(conv: nn.Conv2d, x: Tensor, first: int, last: int) -> Tensor:
    """`convolve_rows` by minimal filtering."""
    kernels = winograd.cached_kernels.of(conv)
    return winograd.convolve(window_rows(x, first - 1, last + 1), kernels, conv.bias)


class EfficientViTBlock(dc_blocks.EfficientViTBlock):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv_out(self.attn(x), may_overwrite=True)
        return out


class MultiscaleLinearAttention(dc_blocks.MultiscaleLinearAttention):
    def forward(self, x: Tensor) -> Tensor:
        return add_normed(self.norm_out, self.change(x), x)

    def attend(self, heads: Tensor) -> Tensor:
        if not needs_pieces(heads):
            return super().attend(heads)
        return pointwise.attend(*heads.chunk(3, dim=-1)).flatten(2)


class GatedConv(dc_blocks.GatedConv):
    def forward(self, x: Tensor, *, may_overwrite: bool = False) -> Tensor:
        channels = self.conv_depth.weight.shape[0]
        if needs_strips(x, channels):
            return by_strips(self._rows, x, channels, margin=1, may_overwrite=may_overwrite)
        return add_normed(self.norm, self.conv_point(self.hidden(x)), x)

    def hidden(self, x: Tensor) -> Tensor:
        """All before the last convolution: (B,C,H,W) -> (B,hidden,H,W)."""
        return gated(self.conv_depth(activate(SILU, self.conv_inverted(x))))

    def _rows(self, x: Tensor, first: int, last: int, out: Tensor) -> None:
        """Rows first to last - 1 of the result."""
        top, bottom = max(0, first - 1), min(last + 1, x.shape[2])
        hidden = activate(SILU, self.conv_inverted(x[:, :, top:bottom]))
        hidden = gated(convolve_rows(self.conv_depth, hidden, first - top, last - top))
        add_normed(self.norm, self.conv_point(hidden), x[:, :, first:last], out)


class DownBlock(dc_blocks.DownBlock):
    def average(self, x: Tensor) -> Tensor:
        """The two usual group sizes take one pass or two."""
        batch, channels, height, width = x.shape
        if self.out_channels == channels:  # a group is the 2x2 pixels of one channel
            return F.avg_pool2d(x, 2)
        if self.out_channels == 2 * channels:  # a group is two pixels of one row
            left, right = torch.unflatten(x, -1, (width // 2, 2)).unbind(-1)
            rows = torch.unflatten((left + right) * 0.5, 2, (height // 2, 2)).permute(0, 2, 4, 1, 3)
            return rows.reshape(batch, height // 2, width // 2, self.out_channels).movedim(-1, 1)
        return super().average(x)


class UpBlock(HasWeightCache, dc_blocks.UpBlock):
    def forward(self, x: Tensor) -> Tensor:
        if self.interpolate and is_inference(x) and isinstance(self.conv, nn.Conv2d):
            return self.by_phases(x, subpixel.cached_kernels.of(self.conv), self.conv.bias)
        self.clear()
        return super().forward(x)

    def by_phases(self, x: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
        """(B,I,H,W) -> (B,C,2H,2W) from kernels (4C,I,2,2) and bias (C,), see `subpixel`."""
        biases = None if bias is None else bias.repeat(4)
        convolve = partial(F.conv2d, weight=kernels, bias=biases, padding=(0, 1))
        return subpixel.upsample(x, convolve, self.out_channels, self.repeats if self.shortcut else None)

    def clear(self) -> None:
        subpixel.cached_kernels.clear(self.conv)


class Decoder(autoencoder.Decoder):
    def activated(self, x: Tensor) -> Tensor:
        """The last block's result, which nobody else needs, normalised and activated."""
        assert isinstance(self.norm_out, ChannelRMSNorm)
        return self.norm_out.activated(x, self.conv_act)


CLASSES: Classes = {
    autoencoder.Decoder: Decoder,
    dc_blocks.ChannelRMSNorm: ChannelRMSNorm,
    dc_blocks.DownBlock: DownBlock,
    dc_blocks.EfficientViTBlock: EfficientViTBlock,
    dc_blocks.GatedConv: GatedConv,
    dc_blocks.MultiscaleLinearAttention: MultiscaleLinearAttention,
    dc_blocks.ResBlock: ResBlock,
    dc_blocks.Stage: Stage,
    dc_blocks.UpBlock: UpBlock,
}
