"""An autoencoder by fused kernels: the same weights, the same roundings or fewer.

Convolutions and matrix products stay torch's; norms, gates, attention and the shuffles between them read and write every
tensor once. What the kernels are not for runs as always.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana_sprint.backends.cuda import transformer as fused
from sana_sprint.models.autoencoder import AutoencoderDC
from sana_sprint.models.dc_blocks import (
    ATTENTION_EPS,
    ChannelRMSNorm,
    Fusible,
    GatedConv,
    MultiscaleLinearAttention,
    QKVScale,
    ResBlock,
    UpBlock,
)
from sana_sprint.models.frugal import is_inference
from sana_sprint.models.layers import pointwise


def use_fused_pixels(model: AutoencoderDC, enabled: bool) -> None:
    """Have an autoencoder's blocks use fused kernels where these apply, or never.

    Raises:
        ValueError: if enabled and Triton is not installed.
    """
    if enabled:
        fused.check_triton()
    for module in model.modules():
        if isinstance(module, Fusible):
            module.fused = _KERNELS[type(module)] if enabled else None
    model.is_fused = enabled


def applies(x: Tensor) -> bool:
    """Whether kernels can read a grid (B,C,H,W): in inference, on an Ampere GPU or later, outside autocast and torch.compile."""
    return (
        is_inference(x)
        and not torch.compiler.is_compiling()
        and x.dtype in fused.DTYPES
        and x.is_contiguous(memory_format=torch.channels_last)
        and fused.runs_on(x.device)
    )


def _norm(
    norm: ChannelRMSNorm, change: Tensor, x: Tensor | None = None, activation: nn.Module | None = None
) -> Tensor | None:
    """The norm, added to x, and activated."""
    from sana_sprint.backends.cuda.kernels.pixels import rms_norm

    if not applies(change) or not (x is None or applies(x)):
        return None
    with fused.on_device(change):
        relu = isinstance(activation, nn.ReLU)
        out = rms_norm(change, norm.weight, norm.bias, norm.eps, add_to=x, relu=relu)
    return out if activation is None or relu else activation(out)


def _upsample(
    block: UpBlock, x: Tensor, kernels: Tensor, bias: Tensor | None, repeats: int | None
) -> Tensor | None:
    from sana_sprint.backends.cuda.kernels.pixels import interleave

    if not applies(x):
        return None
    phases = F.conv2d(x, kernels, padding=1).contiguous(memory_format=torch.channels_last)
    with fused.on_device(x):
        return interleave(phases, bias, None if repeats is None else x, repeats or 1)


def _activate(block: ResBlock, x: Tensor) -> Tensor | None:
    """The first convolution and its activation."""
    from sana_sprint.backends.cuda.kernels.pixels import silu

    conv = block.conv1
    if not applies(x) or not isinstance(block.nonlinearity, nn.SiLU) or not isinstance(conv, nn.Conv2d):
        return None
    assert conv.bias is not None
    hidden = F.conv2d(x, conv.weight, padding=1).contiguous(memory_format=torch.channels_last)
    with fused.on_device(x):
        return silu(hidden, conv.bias)


def _gate(layer: GatedConv, x: Tensor) -> Tensor | None:
    """What comes between the 1x1 convolutions: (B,C,H,W) -> (B,hidden,H,W)."""
    from sana_sprint.backends.cuda.kernels.convolution import gated_depthwise

    bias = layer.conv_depth.bias
    if not applies(x) or bias is None:
        return None
    grid = (x.shape[2], x.shape[3])
    hidden = pointwise(layer.conv_inverted, x.movedim(1, -1).flatten(1, 2))
    with fused.on_device(x):
        gated = gated_depthwise(hidden, layer.conv_depth.weight, bias, grid)
    return torch.unflatten(gated, 1, grid).movedim(-1, 1)


def _mix(layer: MultiscaleLinearAttention, qkv: Tensor) -> Tensor | None:
    """Attention of all scales, (B,3*inner,H,W) -> (B,N,scales*inner)."""
    from sana_sprint.backends.cuda.kernels.attention import attend_heads

    dim = layer.head_dim  # E
    if not applies(qkv) or dim > fused.LARGEST_HEAD_DIM:
        return None
    images, channels = qkv.shape[:2]
    num_heads = channels // (3 * dim)
    # (B,N,K,3,E)
    scales = [torch.unflatten(qkv.movedim(1, -1).flatten(1, 2), -1, (num_heads, 3, dim))]
    for scale in layer.to_qkv_multiscale:
        assert isinstance(scale, QKVScale)
        near = _aggregate(scale.proj_in, qkv).contiguous(memory_format=torch.channels_last)
        pixels = near.movedim(1, -1).reshape(-1, 3 * num_heads, dim)
        weights = scale.proj_out.weight.view(3 * num_heads, dim, dim)
        # A product for each group: convolutions of so many groups take a launch for each.
        mixed = torch.bmm(pixels.transpose(0, 1), weights.transpose(1, 2))  # (3K,B*N,E)
        scales.append(mixed.view(num_heads, 3, images, -1, dim).permute(2, 3, 0, 1, 4))
    out = qkv.new_empty(*scales[0].shape[:2], len(scales), num_heads, dim)
    with fused.on_device(qkv):
        for number, heads in enumerate(scales):
            q, k, v = heads.unbind(3)
            attend_heads(q, k, v, out[:, :, number], eps=ATTENTION_EPS)
    return out.flatten(2)


def _aggregate(conv: nn.Conv2d, x: Tensor) -> Tensor:
    from sana_sprint.backends.cuda.kernels.convolution import depthwise5

    if conv.kernel_size == (5, 5):
        with fused.on_device(x):
            return depthwise5(x, conv.weight)
    out: Tensor = conv(x)
    return out


_KERNELS: dict[type[nn.Module], Callable[..., Any]] = {
    ChannelRMSNorm: _norm,
    GatedConv: _gate,
    MultiscaleLinearAttention: _mix,
    ResBlock: _activate,
    UpBlock: _upsample,
}
