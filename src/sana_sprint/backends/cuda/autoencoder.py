"""An autoencoder by fused kernels: the same weights, the same roundings or fewer.

Convolutions and matrix products stay torch's; norms, gates, attention and the shuffles between them read and write every
tensor once. Where the kernels are not for a tensor, see `applies`, blocks run as in `cpu.autoencoder`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana_sprint.backends.cpu import autoencoder as cpu
from sana_sprint.backends.cpu.strips import is_inference
from sana_sprint.backends.cuda import device
from sana_sprint.backends.cuda.device import DTYPES, LARGEST_HEAD_DIM, on_device
from sana_sprint.backends.swap import Classes
from sana_sprint.models.dc_blocks import QKVScale
from sana_sprint.models.layers import LINEAR_ATTENTION_EPS, pointwise


def applies(x: Tensor) -> bool:
    """Whether kernels can read a grid (B,C,H,W): in inference, on an Ampere GPU or later, outside autocast and torch.compile."""
    return (
        is_inference(x)
        and not torch.compiler.is_compiling()
        and x.dtype in DTYPES
        and x.is_contiguous(memory_format=torch.channels_last)
        and device.runs_on(x.device)
    )


class ChannelRMSNorm(cpu.ChannelRMSNorm):
    def add(self, change: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
        if out is not None or not (applies(change) and applies(x)):
            return super().add(change, x, out)
        return self._by_kernel(change, add_to=x)

    def activated(self, x: Tensor, activation: nn.Module) -> Tensor:
        if not applies(x):
            return super().activated(x, activation)
        if isinstance(activation, nn.ReLU):
            return self._by_kernel(x, relu=True)
        out: Tensor = activation(self._by_kernel(x))
        return out

    def _by_kernel(self, x: Tensor, *, add_to: Tensor | None = None, relu: bool = False) -> Tensor:
        from sana_sprint.backends.cuda.kernels.pixels import rms_norm

        with on_device(x):
            return rms_norm(x, self.weight, self.bias, self.eps, add_to=add_to, relu=relu)


class ResBlock(cpu.ResBlock):
    def hidden(self, x: Tensor) -> Tensor:
        from sana_sprint.backends.cuda.kernels.pixels import silu

        conv = self.conv1
        if (
            not applies(x)
            or not isinstance(self.nonlinearity, nn.SiLU)
            or not isinstance(conv, nn.Conv2d)
            or conv.bias is None
        ):
            return super().hidden(x)
        hidden = F.conv2d(x, conv.weight, padding=1).contiguous(memory_format=torch.channels_last)
        with on_device(x):
            return silu(hidden, conv.bias)


class GatedConv(cpu.GatedConv):
    def hidden(self, x: Tensor) -> Tensor:
        from sana_sprint.backends.cuda.kernels.convolution import gated_depthwise

        bias = self.conv_depth.bias
        if not applies(x) or bias is None:
            return super().hidden(x)
        grid = (x.shape[2], x.shape[3])
        expand: nn.Module = self.conv_inverted
        if isinstance(expand, nn.Conv2d):
            hidden = pointwise(expand, x.movedim(1, -1).flatten(1, 2))
        else:  # a quantised layer in its place takes grids
            hidden = expand(x).movedim(1, -1).flatten(1, 2)
        with on_device(x):
            gated = gated_depthwise(hidden, self.conv_depth.weight, bias, grid)
        return torch.unflatten(gated, 1, grid).movedim(-1, 1)


class UpBlock(cpu.UpBlock):
    def by_phases(self, x: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
        from sana_sprint.backends.cuda.kernels.pixels import interleave

        if not applies(x):
            return super().by_phases(x, kernels, bias)
        phases = F.conv2d(x, kernels, padding=1).contiguous(memory_format=torch.channels_last)
        with on_device(x):
            return interleave(
                phases, bias, x if self.shortcut else None, self.repeats if self.shortcut else 1
            )


class MultiscaleLinearAttention(cpu.MultiscaleLinearAttention):
    def mix(self, qkv: Tensor) -> Tensor:
        from sana_sprint.backends.cuda.kernels.attention import attend_heads

        dim = self.head_dim  # E
        if not applies(qkv) or dim > LARGEST_HEAD_DIM:
            return super().mix(qkv)
        images, channels = qkv.shape[:2]
        num_heads = channels // (3 * dim)
        # (B,N,K,3,E)
        scales = [torch.unflatten(qkv.movedim(1, -1).flatten(1, 2), -1, (num_heads, 3, dim))]
        for scale in self.to_qkv_multiscale:
            assert isinstance(scale, QKVScale)
            near = _aggregate(scale.proj_in, qkv).contiguous(memory_format=torch.channels_last)
            pixels = near.movedim(1, -1).reshape(-1, 3 * num_heads, dim)
            weights = scale.proj_out.weight.view(3 * num_heads, dim, dim)
            # A product for each group: convolutions of so many groups take a launch for each.
            mixed = torch.bmm(pixels.transpose(0, 1), weights.transpose(1, 2))  # (3K,B*N,E)
            scales.append(mixed.view(num_heads, 3, images, -1, dim).permute(2, 3, 0, 1, 4))
        out = qkv.new_empty(*scales[0].shape[:2], len(scales), num_heads, dim)
        with on_device(qkv):
            for number, heads in enumerate(scales):
                q, k, v = heads.unbind(3)
                attend_heads(q, k, v, out[:, :, number], eps=LINEAR_ATTENTION_EPS)
        return out.flatten(2)


def _aggregate(conv: nn.Conv2d, x: Tensor) -> Tensor:
    from sana_sprint.backends.cuda.kernels.convolution import depthwise5

    if conv.kernel_size == (5, 5):
        with on_device(x):
            return depthwise5(x, conv.weight)
    out: Tensor = conv(x)
    return out


CLASSES: Classes = {
    cpu.ChannelRMSNorm: ChannelRMSNorm,
    cpu.GatedConv: GatedConv,
    cpu.MultiscaleLinearAttention: MultiscaleLinearAttention,
    cpu.ResBlock: ResBlock,
    cpu.UpBlock: UpBlock,
}
