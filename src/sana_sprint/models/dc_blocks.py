"""The blocks a deep-compression autoencoder (DC-AE, arXiv 2410.10733) is made of.

Everything is (B,C,H,W) in channels_last memory, where normalising over channels, 1x1 maps and attention read
their inputs through views; each block returns what it was given, channels_last. Attribute names are the published
checkpoint keys. Configurations are checked in `autoencoder.py`: here wrong sizes fail as torch reports them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana_sprint.models import winograd
from sana_sprint.models.derived import Derived
from sana_sprint.models.frugal import (
    by_strips,
    convolve_rows,
    is_inference,
    needs_pieces,
    needs_strips,
    over_pixels,
    window_rows,
)
from sana_sprint.models.layers import (
    SILU,
    activate,
    attend_in_pieces,
    autocast_off,
    gated,
    wide_dtype,
    wide_normed,
)
from sana_sprint.models.upsampling import phase_kernels, upsample
from sana_sprint.models.winograd import transformed_kernels

ATTENTION_EPS = 1e-15  # keeps linear attention's quotient defined where every ReLU feature is zero


class Fusible(nn.Module):
    """A layer of which a part may run as a fused kernel.

    `fused`, if set, is asked first: with the layer and that part's arguments it gives the same result faster, or None
    where it does not apply; see `sana_sprint.backends.cuda.autoencoder`.
    """

    fused: Callable[..., Tensor | None] | None = None

    def by_kernel(self, *arguments: Any) -> Tensor | None:
        """What `fused` makes of these, if it is set."""
        return None if self.fused is None else self.fused(self, *arguments)


class Deriving(Fusible):
    """A layer that keeps what it made from its weights, while these stay as they are."""

    derived: tuple[Derived, ...]

    def forget(self) -> None:
        """Free the memory: the weights may be about to change, and fused optimizers leave no trace."""
        for kept in self.derived:
            kept.forget()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self.forget()  # or a model that is moved away would leave it behind
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return self


class ChannelRMSNorm(Fusible):
    """RMS normalisation over the channels of each pixel, with weight and bias; statistics in fp32."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def pixels(self, x: Tensor) -> Tensor:
        """The norm of (...,C)."""
        normed = F.rms_norm(x.to(wide_dtype(x)), self.weight.shape, None, self.eps).to(x.dtype)
        return torch.addcmul(self.bias.to(x.dtype), normed, self.weight.to(x.dtype))

    def wide_pixels(self, x: Tensor) -> Tensor:
        """`pixels` without gradients and in fewer passes over memory, before it is rounded: in fp32 or wider."""
        wide = wide_normed(x, self.eps)
        return torch.addcmul(self.bias.to(wide.dtype), wide, self.weight.to(wide.dtype), out=wide)

    def forward(self, x: Tensor) -> Tensor:
        return self.pixels(x.movedim(1, -1)).movedim(-1, 1)


# By their names in a config.json. relu6 is known to the original DC-AE code only, the others to diffusers too.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "mish": nn.Mish,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
}
NORMS: dict[str, type[ChannelRMSNorm] | type[nn.BatchNorm2d]] = {
    "batch_norm": nn.BatchNorm2d,
    "rms_norm": ChannelRMSNorm,
}


def add_normed(norm: nn.Module, change: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """`x + norm(change)`, into `out` if given, which may be x; `change` is given up."""
    if not isinstance(norm, ChannelRMSNorm):
        total: Tensor = x + norm(change)
        return total if out is None else out.copy_(total)
    if out is None and (fused := norm.by_kernel(change, x)) is not None:
        return fused
    if needs_pieces(change):
        return over_pixels(lambda change, x: norm.wide_pixels(change).add_(x), change, x, out=out)
    return over_pixels(lambda change, x: x + norm.pixels(change), change, x, out=out)


class ResBlock(Deriving):
    """x + norm(conv3x3(act(conv3x3(x))))."""

    def __init__(self, channels: int, norm: str, activation: str) -> None:
        super().__init__()
        self.nonlinearity = ACTIVATIONS[activation]()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = NORMS[norm](channels)
        self.derived = Derived(transformed_kernels), Derived(transformed_kernels)

    def forward(self, x: Tensor, *, may_overwrite: bool = False) -> Tensor:
        minimal = all(winograd.pays(conv, x) for conv in (self.conv1, self.conv2))
        if minimal or needs_strips(x, x.shape[1]):
            rows = partial(self._rows, minimal)
            return by_strips(rows, x, x.shape[1], margin=2, may_overwrite=may_overwrite)
        if not is_inference(x):
            self.forget()
        hidden = self.by_kernel(x)
        if hidden is None:
            hidden = activate(self.nonlinearity, self.conv1(x))
        return add_normed(self.norm, self.conv2(hidden), x)

    def _rows(self, minimal: bool, x: Tensor, first: int, last: int, out: Tensor) -> None:
        """Rows first to last - 1 of the result, by minimal filtering or not."""
        top = max(0, first - 1)
        hidden = self._convolve(minimal, 0, x, top, min(last + 1, x.shape[2]))
        hidden = activate(self.nonlinearity, hidden)
        change = self._convolve(minimal, 1, hidden, first - top, last - top)
        add_normed(self.norm, change, x[:, :, first:last], out)

    def _convolve(self, minimal: bool, number: int, x: Tensor, first: int, last: int) -> Tensor:
        """Rows first to last - 1 of a convolution of x."""
        conv = (self.conv1, self.conv2)[number]
        if not minimal:
            return convolve_rows(conv, x, first, last)
        kernels = self.derived[number].of(conv)
        return winograd.convolve(window_rows(x, first - 1, last + 1), kernels, conv.bias)


class EfficientViTBlock(nn.Module):
    """Multi-scale linear attention, then a gated depthwise-convolution feed-forward; each adds to its input."""

    def __init__(self, channels: int, head_dim: int, kernel_sizes: tuple[int, ...], norm: str) -> None:
        super().__init__()
        self.attn = MultiscaleLinearAttention(channels, head_dim, kernel_sizes, norm)
        self.conv_out = GatedConv(channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv_out(self.attn(x), may_overwrite=True)
        return out


class MultiscaleLinearAttention(Fusible):
    """ReLU linear attention over all pixels; q, k, v also seen through depthwise kernels of given (odd) sizes."""

    def __init__(self, channels: int, head_dim: int, kernel_sizes: tuple[int, ...], norm: str) -> None:
        super().__init__()
        self.head_dim = head_dim
        num_heads = channels // head_dim
        inner = num_heads * head_dim
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_k = nn.Linear(channels, inner, bias=False)
        self.to_v = nn.Linear(channels, inner, bias=False)
        self.to_qkv_multiscale = nn.ModuleList(QKVScale(inner, num_heads, size) for size in kernel_sizes)
        self.to_out = nn.Linear(inner * (1 + len(kernel_sizes)), channels, bias=False)
        self.norm_out = NORMS[norm](channels)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        pixels = x.movedim(1, -1)
        qkv = torch.cat([self.to_q(pixels), self.to_k(pixels), self.to_v(pixels)], dim=-1).movedim(-1, 1)
        mixed = self.by_kernel(qkv)
        if mixed is None:
            scales = (qkv, *(scale(qkv) for scale in self.to_qkv_multiscale))
            mixed = torch.cat([self._mix(scale) for scale in scales], dim=-1)
        change = self.to_out(torch.unflatten(mixed, 1, (height, width))).movedim(-1, 1)
        return add_normed(self.norm_out, change, x)

    def _mix(self, qkv: Tensor) -> Tensor:
        """Attention of one scale, (B,3*inner,H,W) -> (B,N,inner)."""
        # As published, a head is any 3E channels in a row, [q|k|v], whichever projection they came from.
        heads = torch.unflatten(qkv.movedim(1, -1).flatten(1, 2), -1, (-1, 3 * self.head_dim))
        if needs_pieces(heads):
            q, k, v = heads.chunk(3, dim=-1)
            return attend_in_pieces(q, k, v, ATTENTION_EPS).flatten(2)
        return linear_attention(heads.transpose(1, 2)).transpose(1, 2).flatten(2)


class QKVScale(nn.Module):
    """q, k and v aggregated over a neighbourhood: depthwise kernel, then a 1x1 mix within each head."""

    def __init__(self, inner: int, num_heads: int, kernel_size: int) -> None:
        super().__init__()
        channels = 3 * inner
        self.proj_in = nn.Conv2d(
            channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=False
        )
        self.proj_out = nn.Conv2d(channels, channels, 1, groups=3 * num_heads, bias=False)

    def forward(self, qkv: Tensor) -> Tensor:
        out: Tensor = self.proj_out(self.proj_in(qkv))
        return out


def linear_attention(heads: Tensor) -> Tensor:
    """`relu(q) (relu(k)^T v) / (relu(q) sum relu(k))`: heads (B,heads,N,3E), which is [q|k|v] -> (B,heads,N,E).

    In fp32: sums over all pixels overflow fp16 and lose bf16's bits. The published code takes the quadratic form
    on grids of few pixels, which is the same sum in another order.
    """
    with autocast_off(heads.device):
        wide = heads.to(wide_dtype(heads), memory_format=torch.contiguous_format)
        q, k, v = wide.chunk(3, dim=-1)
        q, k = torch.relu(q), torch.relu(k)
        weight = q @ k.sum(dim=-2).unsqueeze(-1)  # (B,heads,N,1)
        return (q @ (k.transpose(-1, -2) @ v) / (weight + ATTENTION_EPS)).to(heads.dtype)


class GatedConv(Fusible):
    """GLUMBConv with residual and norm: 1x1 expand, SiLU, depthwise 3x3, gate, 1x1, RMS norm."""

    def __init__(self, channels: int, expand_ratio: int = 4) -> None:
        super().__init__()
        hidden = channels * expand_ratio
        self.conv_inverted = nn.Conv2d(channels, 2 * hidden, 1)
        self.conv_depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = nn.Conv2d(hidden, channels, 1, bias=False)
        self.norm = ChannelRMSNorm(channels)

    def forward(self, x: Tensor, *, may_overwrite: bool = False) -> Tensor:
        hidden = self.conv_depth.weight.shape[0]
        if needs_strips(x, hidden):
            return by_strips(self._rows, x, hidden, margin=1, may_overwrite=may_overwrite)
        by_kernel = self.by_kernel(x)
        if by_kernel is not None:
            return add_normed(self.norm, self.conv_point(by_kernel), x)
        return self._contract(self.conv_depth(self._expand(x)), x)

    def _rows(self, x: Tensor, first: int, last: int, out: Tensor) -> None:
        """Rows first to last - 1 of the result."""
        top, bottom = max(0, first - 1), min(last + 1, x.shape[2])
        hidden = self._expand(x[:, :, top:bottom])
        hidden = convolve_rows(self.conv_depth, hidden, first - top, last - top)
        self._contract(hidden, x[:, :, first:last], out)

    def _expand(self, x: Tensor) -> Tensor:
        return activate(SILU, self.conv_inverted(x))

    def _contract(self, hidden: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
        return add_normed(self.norm, self.conv_point(gated(hidden)), x, out)


class Stage(nn.Sequential):
    """Blocks one after the other; the input is given up."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x, may_overwrite=True) if isinstance(block, ResBlock) else block(x)
        return x


class DownBlock(nn.Module):
    """Halves the grid by convolution; a parameter-free shortcut averages groups of space-to-channel pixels."""

    def __init__(self, in_channels: int, out_channels: int, *, unshuffle: bool, shortcut: bool) -> None:
        super().__init__()
        self.unshuffle = unshuffle
        self.shortcut = shortcut
        self.out_channels = out_channels
        conv_channels, stride = (out_channels // 4, 1) if unshuffle else (out_channels, 2)
        self.conv = nn.Conv2d(in_channels, conv_channels, 3, stride=stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        if self.unshuffle:
            y = _space_to_channels(y)
        return y + _average_groups(x, self.out_channels) if self.shortcut else y


class UpBlock(Deriving):
    """Doubles the grid by convolution; a parameter-free shortcut duplicates channels into pixels.

    Without gradients, repeating each pixel and convolving the result is done as four 2x2 convolutions of the small grid
    (`upsampling.py`), in 4/9 of the operations.
    """

    def __init__(self, in_channels: int, out_channels: int, *, interpolate: bool, shortcut: bool) -> None:
        super().__init__()
        self.interpolate = interpolate
        self.shortcut = shortcut
        self.out_channels = out_channels
        self.repeats = out_channels * 4 // in_channels
        self.conv = nn.Conv2d(in_channels, out_channels if interpolate else 4 * out_channels, 3, padding=1)
        self.derived = (Derived(phase_kernels),)

    def forward(self, x: Tensor) -> Tensor:
        if not self.interpolate:
            y: Tensor = self.conv(x)
            return channels_to_space(y + repeat_channels(x, self.repeats) if self.shortcut else y)
        repeats = self.repeats if self.shortcut else None
        if getattr(self.conv, "gives_phases", False):  # a quantised layer in the convolution's place
            return upsample(x, self.conv, self.out_channels, repeats)
        if is_inference(x) and isinstance(self.conv, nn.Conv2d):
            kernels, bias = self.derived[0].of(self.conv), self.conv.bias
            if (fused := self.by_kernel(x, kernels, bias, repeats)) is not None:
                return fused
            biases = None if bias is None else bias.repeat(4)
            convolve = partial(F.conv2d, weight=kernels, bias=biases, padding=(0, 1))
            return upsample(x, convolve, self.out_channels, repeats)
        self.forget()
        y = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return y + channels_to_space(repeat_channels(x, self.repeats)) if self.shortcut else y


# --- Moving between channels and pixels, without leaving channels_last -------------------------------------------
# Channels are repeated and averaged along the last axis of a view: along axis 1 itself the result would come out
# contiguous. The shuffles keep channels_last on a CPU, where their `contiguous` copies nothing; elsewhere they may not.


def repeat_channels(x: Tensor, repeats: int) -> Tensor:
    """Each channel `repeats` times in a row: (B,C,H,W) -> (B,C*repeats,H,W)."""
    return x.movedim(1, -1).repeat_interleave(repeats, dim=-1).movedim(-1, 1)


def average_channels(x: Tensor, out_channels: int) -> Tensor:
    """Mean over groups of neighbouring channels: (B,C,H,W) -> (B,out_channels,H,W)."""
    return torch.unflatten(x.movedim(1, -1), -1, (out_channels, -1)).mean(dim=-1).movedim(-1, 1)


def channels_to_space(x: Tensor) -> Tensor:
    return F.pixel_shuffle(x, 2).contiguous(memory_format=torch.channels_last)


def _space_to_channels(x: Tensor) -> Tensor:
    return F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)


def _average_groups(x: Tensor, out_channels: int) -> Tensor:
    """`average_channels(F.pixel_unshuffle(x, 2), out_channels)`; the two usual group sizes take one pass or two."""
    batch, channels, height, width = x.shape
    if out_channels == channels:  # a group is the 2x2 pixels of one channel
        return F.avg_pool2d(x, 2)
    if out_channels == 2 * channels:  # a group is two pixels of one row
        left, right = torch.unflatten(x, -1, (width // 2, 2)).unbind(-1)
        rows = torch.unflatten((left + right) * 0.5, 2, (height // 2, 2)).permute(0, 2, 4, 1, 3)
        return rows.reshape(batch, height // 2, width // 2, out_channels).movedim(-1, 1)
    return average_channels(_space_to_channels(x), out_channels)
