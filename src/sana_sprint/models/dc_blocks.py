"""The blocks a deep-compression autoencoder (DC-AE, arXiv 2410.10733) is made of.

Everything is (B,C,H,W) in channels_last memory, where normalising over channels, 1x1 maps and attention read
their inputs through views; each block returns channels_last too. Attribute names are the published checkpoint keys.
Configurations are checked in `autoencoder.py`: here wrong sizes fail as torch reports them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import attend, wide_dtype


class ChannelRMSNorm(nn.Module):
    """RMS normalisation over the channels of each pixel, with weight and bias; statistics in fp32."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.pixels(x.movedim(1, -1)).movedim(-1, 1)

    def pixels(self, x: Tensor) -> Tensor:
        """The norm of (...,C)."""
        normed = F.rms_norm(x.to(wide_dtype(x)), self.weight.shape, None, self.eps).to(x.dtype)
        return torch.addcmul(self.bias.to(x.dtype), normed, self.weight.to(x.dtype))


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


class Stage(nn.Sequential):
    """The blocks of one grid size, one after the other."""


class ResBlock(nn.Module):
    """x + norm(conv3x3(act(conv3x3(x))))."""

    def __init__(self, channels: int, norm: str, activation: str) -> None:
        super().__init__()
        self.nonlinearity = ACTIVATIONS[activation]()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = NORMS[norm](channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.norm(self.conv2(self.nonlinearity(self.conv1(x))))
        return out


class EfficientViTBlock(nn.Module):
    """Multi-scale linear attention, then a gated depthwise-convolution feed-forward; each adds to its input."""

    def __init__(self, channels: int, head_dim: int, kernel_sizes: tuple[int, ...], norm: str) -> None:
        super().__init__()
        self.attn = MultiscaleLinearAttention(channels, head_dim, kernel_sizes, norm)
        self.conv_out = GatedConv(channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv_out(self.attn(x))
        return out


class MultiscaleLinearAttention(nn.Module):
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
        out: Tensor = x + self.norm_out(self.change(x))
        return out

    def change(self, x: Tensor) -> Tensor:
        """The attention's output, (B,C,H,W), before it is normalised and added."""
        pixels = x.movedim(1, -1)
        qkv = torch.cat([self.to_q(pixels), self.to_k(pixels), self.to_v(pixels)], dim=-1).movedim(-1, 1)
        mixed = torch.unflatten(self.mix(qkv), 1, x.shape[-2:])  # (B,H,W,scales*inner)
        out: Tensor = self.to_out(mixed).movedim(-1, 1)
        return out

    def mix(self, qkv: Tensor) -> Tensor:
        """Attention of all scales, (B,3*inner,H,W) -> (B,N,scales*inner)."""
        scales = (qkv, *(scale(qkv) for scale in self.to_qkv_multiscale))
        return torch.cat([self.attend(self.heads(scale)) for scale in scales], dim=-1)

    def heads(self, qkv: Tensor) -> Tensor:
        """(B,3*inner,H,W) -> (B,N,heads,3E). As published, a head is any 3E channels in a row, [q|k|v]."""
        return torch.unflatten(qkv.movedim(1, -1).flatten(1, 2), -1, (-1, 3 * self.head_dim))

    def attend(self, heads: Tensor) -> Tensor:
        """Attention of one scale, (B,N,heads,3E) -> (B,N,inner)."""
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
    """ReLU linear attention, see `layers.attend`: heads (B,heads,N,3E), which is [q|k|v] -> (B,heads,N,E).

    The published code takes the quadratic form on grids of few pixels, which is the same sum in another order.
    """
    q, k, v = heads.to(wide_dtype(heads), memory_format=torch.contiguous_format).chunk(3, dim=-1)
    return attend(torch.relu(q), torch.relu(k), v).to(heads.dtype)


class GatedConv(nn.Module):
    """GLUMBConv with residual and norm: 1x1 expand, SiLU, depthwise 3x3, gate, 1x1, RMS norm."""

    def __init__(self, channels: int, expand_ratio: int = 4) -> None:
        super().__init__()
        hidden = channels * expand_ratio
        self.conv_inverted = nn.Conv2d(channels, 2 * hidden, 1)
        self.conv_depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = nn.Conv2d(hidden, channels, 1, bias=False)
        self.norm = ChannelRMSNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.conv_depth(F.silu(self.conv_inverted(x))).chunk(2, dim=1)
        out: Tensor = x + self.norm(self.conv_point(value * F.silu(gate)))
        return out


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
            y = space_to_channels(y)
        return y + self.average(x) if self.shortcut else y

    def average(self, x: Tensor) -> Tensor:
        """The shortcut: (B,C,2H,2W) -> (B,out_channels,H,W)."""
        return average_channels(space_to_channels(x), self.out_channels)


class UpBlock(nn.Module):
    """Doubles the grid by convolution; a parameter-free shortcut duplicates channels into pixels."""

    def __init__(self, in_channels: int, out_channels: int, *, interpolate: bool, shortcut: bool) -> None:
        super().__init__()
        self.interpolate = interpolate
        self.shortcut = shortcut
        self.out_channels = out_channels
        self.repeats = out_channels * 4 // in_channels
        self.conv = nn.Conv2d(in_channels, out_channels if interpolate else 4 * out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.interpolate:
            y: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
            return y + channels_to_space(repeat_channels(x, self.repeats)) if self.shortcut else y
        y = self.conv(x)
        return channels_to_space(y + repeat_channels(x, self.repeats) if self.shortcut else y)


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
    """(B,4C,H,W) -> (B,C,2H,2W)."""
    return F.pixel_shuffle(x, 2).contiguous(memory_format=torch.channels_last)


def space_to_channels(x: Tensor) -> Tensor:
    """(B,C,2H,2W) -> (B,4C,H,W)."""
    return F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)
