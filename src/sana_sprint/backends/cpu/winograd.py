"""3x3 convolutions by Winograd's minimal filtering, F(2x2,3x3) (Lavin & Gray 2016, section 4.1), on a CPU.

Four pixels of the result, a tile, need 16 products of each channel where there were 36: a tile sees 4x4 pixels, whose
sums and differences (16 numbers, as many as a kernel's) are multiplied one by one. So a convolution becomes 16 matrix
products and a few passes over memory, which pay where there are many channels.

Sums before and after the products are rounded to the dtype: a convolution is four times as far from the exact result as a
direct one in the same dtype, which rounds once, or two bits. Of a picture's whole error that is nothing to be seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from sana_sprint.backends.cpu.strips import is_cpu_inference
from sana_sprint.backends.weight_cache import CachedFromWeight
from sana_sprint.models.layers import wide_dtype
from sana_sprint.torch_private import has_bf16_products

LEAST_CHANNELS = 128  # with fewer the passes cost what the products save
LEAST_PIXELS = 4096  # of fewer, the 16 products are too small
PIECE = 1 << 24  # bytes of the factors and results of the 16 products of a piece: they should stay in cache
# A kernel's 16 numbers are G k G^T, and 4 pixels are A^T m A of 16 products m.
_G = [[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]]
_A = [[1.0, 1.0, 1.0, 0.0], [0.0, 1.0, -1.0, -1.0]]  # transposed


def pays(conv: nn.Module, x: Tensor) -> bool:
    """Whether to convolve this grid (B,C,H,W) so: a convolution that keeps the grid's size, on a CPU and without gradients."""
    return (
        isinstance(conv, nn.Conv2d)
        and conv.kernel_size == (3, 3)
        and conv.stride == conv.dilation == conv.padding == (1, 1)
        and conv.groups == 1
        and min(conv.in_channels, conv.out_channels) >= LEAST_CHANNELS
        and x.shape[2] * x.shape[3] >= LEAST_PIXELS
        and is_cpu_inference(x)
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and _multiplies_bf16()))
    )


@cache
def _multiplies_bf16() -> bool:
    """Whether matrix products in bf16 are faster than in fp32 here; where they are not, they are hardly done at all."""
    return has_bf16_products()


def transformed_kernels(weight: Tensor) -> Tensor:
    """Kernels (K,C,3,3) -> (16,C,K), computed in fp32."""
    wide = weight.detach().to(wide_dtype(weight))
    g = torch.tensor(_G, dtype=wide.dtype, device=wide.device)
    return torch.einsum("ai,kcij,bj->abck", g, wide, g).flatten(0, 1).to(weight.dtype)


cached_kernels = CachedFromWeight(transformed_kernels)


def convolve(window: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
    """A picture (1,C,H+2,W), channels_last -> (1,K,H,W): rows have their neighbours, columns are padded with zeros here.

    kernels (16,C,K): see `transformed_kernels`; bias (K,).
    """
    height, width = window.shape[2] - 2, window.shape[3]
    high, wide = -(-height // 2), -(-width // 2)  # tiles
    channels, outputs = kernels.shape[1:]
    out = window.new_empty(high, 2, wide, 2, outputs)
    row = 16 * wide * max(channels, outputs) * window.element_size()
    rows = -(-high // -(-high * row // PIECE))  # of tiles; pieces as equal as they can be
    inputs, products = (window.new_empty(16 * rows * wide * size) for size in (channels, outputs))
    pixels = window[0].permute(1, 2, 0)
    # Every second column, from the zeros before the first and from the first on; zeros behind where tiles stand out.
    columns = window.new_zeros(2, 2 * rows + 2, wide + 1, channels)
    sums = window.new_empty(4, 2, rows, wide + 1, channels)
    side = window.new_tensor(_A)
    a = torch.kron(side, side)
    for first in range(0, high, rows):
        count = min(rows, high - first)
        part = pixels[2 * first : 2 * (first + count) + 2]
        columns[1, : len(part), : (width + 1) // 2] = part[:, 0::2]
        columns[0, : len(part), 1 : width // 2 + 1] = part[:, 1::2]
        columns[:, len(part) :] = 0
        spread = inputs[: 16 * count * wide * channels].view(4, 4, count, wide, channels)
        made = products[: 16 * count * wide * outputs].view(16, count * wide, outputs)
        _spread(columns, sums[:, :, :count], spread)
        torch.bmm(spread.view(16, count * wide, channels), kernels, out=made)
        _gather(a, made, bias, out[first : first + count])
    result = out.view(2 * high, 2 * wide, outputs)[:height, :width].permute(2, 0, 1)[None]
    return result.contiguous(memory_format=torch.channels_last)


def _spread(columns: Tensor, sums: Tensor, out: Tensor) -> None:
    """Pixels (2,2T+2,S+1,C), even and odd columns apart, -> B^T d B of the T x S tiles' d, into (4,4,T,S,C).

    `sums` (4,2,T,S+1,C) is for what is in between. So every operand has a row's numbers side by side.
    """
    high, wide = out.shape[2:4]
    _filter([columns[:, i : i + 2 * high : 2] for i in range(4)], sums)
    even, odd = sums.unbind(1)
    _filter([even[:, :, :wide], odd[:, :, :wide], even[:, :, 1:], odd[:, :, 1:]], out.transpose(0, 1))


def _filter(d: Sequence[Tensor], out: Tensor) -> None:
    """B^T d of four d along one axis, into (4,...)."""
    torch.sub(d[0], d[2], out=out[0])
    torch.add(d[1], d[2], out=out[1])
    torch.sub(d[2], d[1], out=out[2])
    torch.sub(d[1], d[3], out=out[3])


def _gather(a: Tensor, products: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """A^T m A + bias of products (16,N,K), into (T,2,S,2,K). One product with a (4,16), all that A does, rounds once."""
    high, _, wide, _, outputs = out.shape
    made = torch.mm(a, products.flatten(1)).view(2, 2, high, wide, outputs)
    target = out.permute(1, 3, 0, 2, 4)
    if bias is None:
        target.copy_(made)
    else:
        torch.add(made, bias, out=target)
