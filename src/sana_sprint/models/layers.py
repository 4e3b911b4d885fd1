"""Layers of the Sana transformer (SANA-Sprint, section 3; SANA, section 2).

Axes: B batch, C latent channels, H W token grid, N = H*W image tokens, L text tokens, D width, K heads, E head dim.
Attribute names are checkpoint keys. Precision is explicit: angles, normalisers and the sums of linear attention
are fp32 (fp64 for fp64 inputs) whatever the weights or the caller's autocast say.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SINUSOID_CHANNELS = 256
QK_NORM_EPS = 1e-5
LINEAR_ATTENTION_EPS = 1e-15  # keeps the quotient defined where every ReLU feature is zero
FP16_MAX = 65504.0


# --- Precision ---------------------------------------------------------------------------------------------------


def wide_dtype(x: Tensor) -> torch.dtype:
    """Dtype for sums and angles over `x`: fp32, or fp64 when `x` is fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The caller's autocast dtype; None if it is off."""
    kind = device.type
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if is_on else None


def autocast_off(device: torch.device) -> AbstractContextManager[None]:
    """Context in which matrix products keep the dtype of their inputs inside a caller's autocast."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)


def product_dtype(weight: Tensor) -> torch.dtype:
    """Dtype in which a product with `weight` runs. Casting to it once spares autocast one cast per consumer."""
    autocast = autocast_dtype(weight.device)
    return autocast if autocast is not None and weight.dtype == torch.float32 else weight.dtype


# --- Embeddings --------------------------------------------------------------------------------------------------


def sinusoid(value: Tensor, channels: int = SINUSOID_CHANNELS, max_period: float = 10_000.0) -> Tensor:
    """`[cos(w_k value) | sin(w_k value)]` with `w_k = max_period^(-k / (channels/2))`: (B,) -> (B, channels), fp32."""
    half = channels // 2
    # In the published order of roundings: times up to 1000 (plain SANA) magnify them to 1e-4 radians.
    exponents = torch.arange(half, device=value.device, dtype=torch.float32) * -math.log(max_period) / half
    angles = value.to(wide_dtype(value))[:, None] * exponents.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def grid_positions(
    height: int, width: int, dim: int, base_size: int, scale: float, device: torch.device
) -> Tensor:
    """Two-dimensional sine-cosine position embedding, (height*width, dim) fp32, row by row.

    The first half of the channels encodes the column, the second the row. A grid of any size spans the same
    coordinates, `[0, base_size / scale)`.
    """
    # Not every backend has fp64; where it does, it keeps the angles of large grids exact.
    wide = torch.float32 if device.type == "mps" else torch.float64
    quarter = dim // 4
    frequencies = 10_000.0 ** (-torch.arange(quarter, device=device, dtype=wide) / quarter)

    def axis(size: int) -> Tensor:
        position = torch.arange(size, device=device, dtype=torch.float32) / (size / base_size) / scale
        angles = position[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1).float()  # (size, dim/2)

    columns = axis(width)[None].expand(height, -1, -1)
    rows = axis(height)[:, None].expand(-1, width, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)


class PatchEmbed(nn.Module):
    """Latent (B,C,H*p,W*p) -> tokens (B,N,D): one linear map per patch of p x p, plus positions when asked for.

    `position_scale` None means no position embedding (the depthwise convolutions tell tokens where they are).
    The table is computed in each call rather than stored: it has no place in a checkpoint, and a buffer
    would be lost on the way through the meta device.
    """

    def __init__(
        self, in_channels: int, dim: int, patch_size: int, base_size: int, position_scale: float | None
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.base_size = base_size
        self.position_scale = position_scale
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, latent: Tensor) -> Tensor:
        p = self.patch_size
        B, C, height, width = latent.shape  # noqa: N806 (axis letters)
        H, W = height // p, width // p  # noqa: N806
        patches = latent.to(self.proj.weight.dtype).view(B, C, H, p, W, p).permute(0, 2, 4, 1, 3, 5)
        with autocast_off(latent.device):  # a few channels only: full precision is free here
            x = F.linear(patches.reshape(B, H * W, C * p * p), self.proj.weight.flatten(1), self.proj.bias)
        if self.position_scale is None:
            return x
        positions = grid_positions(H, W, x.shape[-1], self.base_size, self.position_scale, x.device)
        return (x + positions).to(x.dtype)


class ScalarEmbedder(nn.Module):
    """A number per image (flow time, scaled guidance) -> (B,D): sinusoid, then a two-layer perceptron."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(SINUSOID_CHANNELS, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, value: Tensor) -> Tensor:
        hidden = F.silu(self.linear_1(sinusoid(value).to(self.linear_1.weight.dtype)))
        out: Tensor = self.linear_2(hidden)
        return out


class TimeEmbedding(nn.Module):
    """Flow time (B,), fp32 -> (modulation (B,6D) shared by all blocks, embedding (B,D)); for models without guidance.

    Raises ValueError if guidance is given.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": ScalarEmbedder(dim)})
        self.linear = nn.Linear(dim, 6 * dim)

    def forward(self, timestep: Tensor, guidance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if guidance is not None:
            raise ValueError(
                "guidance was given, but this model has no guidance embedding (guidance_embeds is False)"
            )
        # B rows only, so full precision costs nothing, and dF/dt is what a consistency model learns from.
        with autocast_off(timestep.device):
            embedding = self.emb["timestep_embedder"](timestep)
            return self.linear(F.silu(embedding)), embedding


class GuidedTimeEmbedding(nn.Module):
    """As `TimeEmbedding`, with the embedded guidance scale added to the embedded time (SANA-Sprint, section 4.3).

    Guidance scales (B,), fp32, as users mean them (4.5); `guidance_scale` multiplies them. Raises ValueError without guidance.
    """

    def __init__(self, dim: int, guidance_scale: float) -> None:
        super().__init__()
        self.guidance_scale = guidance_scale
        self.timestep_embedder = ScalarEmbedder(dim)
        self.guidance_embedder = ScalarEmbedder(dim)
        self.linear = nn.Linear(dim, 6 * dim)

    def forward(self, timestep: Tensor, guidance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if guidance is None:
            raise ValueError(
                "guidance is missing: this model embeds it (guidance_embeds is True), e.g. 4.5 per image"
            )
        # Scaled in fp32: in bf16, 0.1 * 4.5 would already be 0.4492.
        scaled = guidance.to(wide_dtype(guidance)) * self.guidance_scale
        with autocast_off(timestep.device):
            embedding = self.timestep_embedder(timestep) + self.guidance_embedder(scaled)
            return self.linear(F.silu(embedding)), embedding


class CaptionProjection(nn.Module):
    """Text features (B,L,caption_channels) -> (B,L,D)."""

    def __init__(self, caption_channels: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(caption_channels, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, text: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))
        return out


# --- Norms -------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)` over the last axis, computed in fp32; the result has the weight's dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = wide_dtype(x)
        normed = F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps)
        return normed.to(self.weight.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`x * (1 + scale) + shift` in one pass; x (B,N,D), shift and scale (B,1,D)."""
    return torch.addcmul(shift, x, 1 + scale)


# --- Attention ---------------------------------------------------------------------------------------------------


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B,N,K*E) -> (B,K,N,E), a view."""
    return torch.unflatten(x, -1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B,K,N,E) -> (B,N,K*E)."""
    return x.transpose(1, 2).flatten(2)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """ReLU linear attention (SANA, section 2.2) of q, k, v (B,N,D): (B,N,D) in fp32, see `attend`."""

    def to_heads(x: Tensor) -> Tensor:
        # One copy does both the cast and the layout that batched products need.
        return split_heads(x, num_heads).to(wide_dtype(v), memory_format=torch.contiguous_format)

    return merge_heads(attend(to_heads(F.relu(q)), to_heads(F.relu(k)), to_heads(v)))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`q (k^T v) / (q sum k)` for each head, (B,K,N,E); q and k are not negative.

    All in fp32 or wider, also under autocast: sums over all N tokens do not fit half precision.
    """
    with autocast_off(v.device):
        numerator = q @ (k.transpose(-1, -2) @ v)  # (B,K,N,E)
        denominator = q @ k.sum(dim=-2).unsqueeze(-1)  # (B,K,N,1)
    return numerator / (denominator + LINEAR_ATTENTION_EPS)


class _Attention(nn.Module):
    """Projections and norms that both kinds of attention have, under the checkpoint's names."""

    def __init__(
        self, dim: int, inner: int, num_heads: int, *, bias: bool, qk_norm: bool, dropout: float
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, inner, bias=bias)
        self.to_k = nn.Linear(dim, inner, bias=bias)
        self.to_v = nn.Linear(dim, inner, bias=bias)
        # Over all heads together (SANA-Sprint, section 3.2): without it the 1.6B teacher's gradients explode.
        self.norm_q = RMSNorm(inner, QK_NORM_EPS) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(inner, QK_NORM_EPS) if qk_norm else nn.Identity()
        self.to_out = nn.ModuleList([nn.Linear(inner, dim), nn.Dropout(dropout)])

    def project_out(self, x: Tensor) -> Tensor:
        bias = self.to_out[0].bias  # in the layer's dtype even where the weight is quantised
        assert isinstance(bias, Tensor)
        out: Tensor = self.to_out[1](self.to_out[0](x.to(product_dtype(bias))))
        return out


class LinearSelfAttention(_Attention):
    """Linear attention among image tokens, (B,N,D) -> (B,N,D)."""

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(x))
        out = self.project_out(self.attend(q, k, self.to_v(x)))
        return out.clamp(-FP16_MAX, FP16_MAX) if out.dtype == torch.float16 else out

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B,N,D) -> (B,N,D)."""
        return linear_attention(q, k, v, self.num_heads)


class CrossAttention(_Attention):
    """Attention of image tokens to a caption whose keys and values were computed before, once for all steps."""

    def encode(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Caption (B,L,D) -> keys and values, each (B,K,L,E)."""
        k, v = self.norm_k(self.to_k(text)), self.to_v(text)
        return split_heads(k.to(v.dtype), self.num_heads), split_heads(v, self.num_heads)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        q = split_heads(self.norm_q(self.to_q(x)), self.num_heads)
        return self.project_out(merge_heads(self.attend(q, k, v, bias)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """Softmax attention of queries (B,K,N,E)."""
        mask = None if bias is None else bias.to(k.dtype)
        return F.scaled_dot_product_attention(q.to(k.dtype), k, v, attn_mask=mask)


# --- Feed-forward ------------------------------------------------------------------------------------------------


def pointwise(layer: nn.Module, x: Tensor) -> Tensor:
    """A 1x1 convolution of tokens (B,N,channels); a quantised layer in its place takes tokens itself."""
    if isinstance(layer, nn.Conv2d):
        return F.linear(x, layer.weight.flatten(1), layer.bias)
    out: Tensor = layer(x)
    return out


class GatedConvFeedForward(nn.Module):
    """Mix-FFN (SANA, section 2.2): 1x1 expand, SiLU, depthwise 3x3, gate, 1x1 contract.

    Tokens stay (B,N,channels), which is channels_last for the depthwise convolution, so nothing is copied;
    1x1 convolutions are linear maps of tokens (their weights keep the convolution's shape for the checkpoint).
    """

    def __init__(self, dim: int, expand_ratio: float) -> None:
        super().__init__()
        hidden = int(expand_ratio * dim)
        self.conv_inverted = nn.Conv2d(dim, 2 * hidden, 1)
        self.conv_depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = nn.Conv2d(hidden, dim, 1, bias=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x (B,N,D), grid (H,W) with H*W = N -> (B,N,D)."""
        hidden = torch.unflatten(pointwise(self.conv_inverted, x), 1, grid).permute(0, 3, 1, 2)
        value, gate = self.conv_depth(F.silu(hidden)).chunk(2, dim=1)
        return pointwise(self.conv_point, (value * F.silu(gate)).permute(0, 2, 3, 1).flatten(1, 2))
