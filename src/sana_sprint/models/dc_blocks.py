"""The blocks a deep-compression autoencoder (DC-AE, arXiv 2410.10733) is made of.

Everything is (B,C,H,W); attribute names are the published checkpoint keys. Memory is best kept in
channels_last, where normalising over channels and 1x1 convolutions need no copies.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_EPS = 1e-15  # keeps linear attention's quotient defined where every ReLU feature is zero
_ACTIVATIONS = {"silu": nn.SiLU, "relu": nn.ReLU, "relu6": nn.ReLU6}


def make_activation(name: str) -> nn.Module:
    """The activation called `name`; ValueError lists the known ones."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; allowed: {', '.join(sorted(_ACTIVATIONS))}")
    return _ACTIVATIONS[name]()


def make_norm(name: str, channels: int) -> nn.Module:
    """The normalisation called `name` over `channels`; ValueError lists the known ones."""
    if name == "rms_norm":
        return ChannelRMSNorm(channels)
    if name == "batch_norm":
        return nn.BatchNorm2d(channels)
    raise ValueError(f"unknown normalisation {name!r}; allowed: batch_norm, rms_norm")


class ChannelRMSNorm(nn.Module):
    """RMS normalisation over the channels of each pixel, with weight and bias; statistics in fp32."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1)  # a view without a copy in channels_last
        x = F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype)
        return torch.addcmul(self.bias.to(x.dtype), x, self.weight.to(x.dtype)).movedim(-1, 1)


class ResBlock(nn.Module):
    """x + norm(conv3x3(act(conv3x3(x))))."""

    def __init__(self, channels: int, norm: str, activation: str) -> None:
        super().__init__()
        self.nonlinearity = make_activation(activation)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = make_norm(norm, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv2(self.nonlinearity(self.conv1(x))))


class EfficientViTBlock(nn.Module):
    """Multi-scale linear attention, then a gated depthwise-convolution feed-forward; each adds to its input."""

    def __init__(self, channels: int, head_dim: int, kernel_sizes: tuple[int, ...], norm: str) -> None:
        super().__init__()
        self.attn = MultiscaleLinearAttention(channels, head_dim, kernel_sizes, norm)
        self.conv_out = GatedConv(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.attn(x))


class MultiscaleLinearAttention(nn.Module):
    """ReLU linear attention over all pixels; q, k, v also seen through depthwise kernels of given sizes.

    Small grids (no more pixels than a head has channels) use the equal quadratic form, as published.
    """

    def __init__(self, channels: int, head_dim: int, kernel_sizes: tuple[int, ...], norm: str) -> None:
        super().__init__()
        self.head_dim = head_dim
        inner = channels // head_dim * head_dim
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_k = nn.Linear(channels, inner, bias=False)
        self.to_v = nn.Linear(channels, inner, bias=False)
        self.to_qkv_multiscale = nn.ModuleList(
            _QKVScale(inner, inner // head_dim, size) for size in kernel_sizes
        )
        self.to_out = nn.Linear(inner * (1 + len(kernel_sizes)), channels, bias=False)
        self.norm_out = make_norm(norm, channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        pixels = x.movedim(1, -1)
        qkv = torch.cat([self.to_q(pixels), self.to_k(pixels), self.to_v(pixels)], dim=-1).movedim(-1, 1)
        scales = torch.cat([qkv, *(scale(qkv) for scale in self.to_qkv_multiscale)], dim=1)
        # (B, heads of all scales, 3E, N): the channels are laid out [q|k|v] per head, as published.
        heads = scales.reshape(batch, -1, 3 * self.head_dim, height * width)
        q, k, v = heads.chunk(3, dim=2)
        mixed = (
            _linear_attention(q, k, v) if height * width > self.head_dim else _quadratic_attention(q, k, v)
        )
        out = self.to_out(mixed.reshape(batch, -1, height, width).movedim(1, -1)).movedim(-1, 1)
        return x + self.norm_out(out)


class _QKVScale(nn.Module):
    """q, k and v aggregated over a neighbourhood: depthwise kernel, then a 1x1 mix within each head."""

    def __init__(self, inner: int, num_heads: int, kernel_size: int) -> None:
        super().__init__()
        channels = 3 * inner
        self.proj_in = nn.Conv2d(
            channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=False
        )
        self.proj_out = nn.Conv2d(channels, channels, 1, groups=3 * num_heads, bias=False)

    def forward(self, qkv: Tensor) -> Tensor:
        return self.proj_out(self.proj_in(qkv))


def _linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(v k^T) q over its row sums, in fp32: the sums over all pixels overflow fp16 and lose bf16's bits."""
    with torch.autocast(q.device.type, enabled=False):
        queries, keys, values = torch.relu(q).float(), torch.relu(k).float(), v.float()
        memory = values @ keys.transpose(-1, -2)  # (B,heads,E,E)
        weight = keys.sum(dim=-1, keepdim=True).transpose(-1, -2) @ queries  # (B,heads,1,N)
        return (memory @ queries / (weight + _EPS)).to(v.dtype)


def _quadratic_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.relu(k).transpose(-1, -2) @ torch.relu(q)  # (B,heads,N keys,N queries)
    weights = weights.float()
    weights = weights / (weights.sum(dim=2, keepdim=True) + _EPS)
    return v @ weights.to(v.dtype)


class GatedConv(nn.Module):
    """GLUMBConv with residual and norm: 1x1 expand, SiLU, depthwise 3x3, gate, 1x1, RMS norm."""

    def __init__(self, channels: int, expand_ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(channels * expand_ratio)
        self.conv_inverted = nn.Conv2d(channels, 2 * hidden, 1)
        self.conv_depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = nn.Conv2d(hidden, channels, 1, bias=False)
        self.norm = ChannelRMSNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.conv_depth(F.silu(self.conv_inverted(x))).chunk(2, dim=1)
        return x + self.norm(self.conv_point(value * F.silu(gate)))


class DownBlock(nn.Module):
    """Halves the grid by convolution; a parameter-free shortcut averages groups of space-to-channel pixels."""

    def __init__(self, in_channels: int, out_channels: int, *, unshuffle: bool, shortcut: bool) -> None:
        super().__init__()
        self.unshuffle = unshuffle
        self.shortcut = shortcut
        self.out_channels = out_channels
        if unshuffle and out_channels % 4:
            raise ValueError(f"pixel_unshuffle needs channels divisible by 4; got {out_channels}")
        conv_channels, stride = (out_channels // 4, 1) if unshuffle else (out_channels, 2)
        self.conv = nn.Conv2d(in_channels, conv_channels, 3, stride=stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.unshuffle:
            y = F.pixel_unshuffle(y, 2)
        if self.shortcut:
            y = y + F.pixel_unshuffle(x, 2).unflatten(1, (self.out_channels, -1)).mean(dim=2)
        return y


class UpBlock(nn.Module):
    """Doubles the grid by convolution; a parameter-free shortcut duplicates channels into pixels."""

    def __init__(self, in_channels: int, out_channels: int, *, interpolate: bool, shortcut: bool) -> None:
        super().__init__()
        self.interpolate = interpolate
        self.shortcut = shortcut
        self.repeats = out_channels * 4 // in_channels
        self.conv = nn.Conv2d(in_channels, out_channels if interpolate else 4 * out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.interpolate:
            y = self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        else:
            y = F.pixel_shuffle(self.conv(x), 2)
        if self.shortcut:
            y = y + F.pixel_shuffle(x.repeat_interleave(self.repeats, dim=1), 2)
        return y
