"""Nearest-neighbour upsampling and a 3x3 convolution of its result, as four 2x2 convolutions of the small grid.

A pixel (2i+a, 2j+b) of the large grid sees, through a 3x3 kernel, 2x2 pixels of the small one: rows i-1+a and i+a,
columns j-1+b and j+b. Taps that fall on the same pixel add up, so each of the four phases (a,b) has a 2x2 kernel of
its own: 16 products per small pixel where there were 36.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sana_sprint.backends.cpu.strips import is_cpu_inference, strips, window_rows
from sana_sprint.backends.weight_cache import CachedFromWeight
from sana_sprint.models.layers import wide_dtype

# [phase][tap of the 2-tap kernel][tap of the 3-tap kernel], along one axis
_SHARES = ([[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]])


def phase_kernels(weight: Tensor) -> Tensor:
    """Kernels (C,I,3,3) -> (4*C,I,2,2), phase by phase; summed in fp32."""
    wide = weight.detach().to(wide_dtype(weight))
    shares = torch.tensor(_SHARES, dtype=wide.dtype, device=wide.device)
    kernels = torch.einsum("apr,bqs,cirs->abcipq", shares, shares, wide).flatten(0, 2)
    return kernels.to(weight.dtype, memory_format=torch.channels_last)


cached_kernels = CachedFromWeight(phase_kernels)


def phase_convolution(conv: nn.Conv2d) -> nn.Conv2d:
    """A 3x3 convolution after 2x nearest upsampling as four 2x2 convolutions, see `upsample`."""
    weight, bias = phase_kernels(conv.weight.detach()), conv.bias
    phases = nn.Conv2d(
        conv.in_channels, len(weight), 2, padding=(0, 1), bias=bias is not None, device="meta"
    ).train(conv.training)
    phases.weight = nn.Parameter(weight, conv.weight.requires_grad)
    if bias is not None:
        phases.bias = nn.Parameter(bias.detach().repeat(4), bias.requires_grad)
    return phases


def upsample(x: Tensor, convolve: Callable[[Tensor], Tensor], channels: int, repeats: int | None) -> Tensor:
    """The small grid (B,I,H,W) -> (B,C,2H,2W), C = `channels`.

    `convolve` computes the four phases of a grid, padded by a column of zeros at each side: (B,I,h,W) -> (B,4*C,h-1,W+1).
    `repeats` adds the shortcut: each channel of `x` so many times in a row, shuffled into pixels.
    """
    batch, _, height, width = x.shape
    size = (batch, channels, 2 * height, 2 * width)
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    row = 4 * channels * width * x.element_size()
    in_strips = is_cpu_inference(x)
    for first, end in strips(height, row) if in_strips else [(0, height)]:
        # One row and one column more than the grid has: each phase takes those that begin where its kernel does.
        phases = convolve(window_rows(x, first - 1, end + 1))
        for phase in range(4):
            a, b = divmod(phase, 2)
            y = phases[:, phase * channels : (phase + 1) * channels, a : a + end - first, b : b + width]
            target = out[:, :, 2 * first + a : 2 * end : 2, b::2]
            if repeats is None:
                target.copy_(y)
            elif in_strips:  # in one pass
                torch.add(y, _shortcut(x[:, :, first:end], repeats, phase), out=target)
            else:
                target.copy_(y + _shortcut(x[:, :, first:end], repeats, phase))
    return out


def _shortcut(x: Tensor, repeats: int, phase: int) -> Tensor:
    """Of channels repeated `repeats` times, each fourth from `phase` on: those that the shuffle puts into that phase."""
    if 4 % repeats == 0:  # no channel twice: a view
        return x[:, phase // repeats :: 4 // repeats]
    index = torch.arange(phase, x.shape[1] * repeats, 4, device=x.device) // repeats
    return x.movedim(1, -1).index_select(-1, index).movedim(-1, 1)
