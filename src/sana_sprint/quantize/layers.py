"""Linear and convolution layers with quantised weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana_sprint import torch_private
from sana_sprint.backends.cpu.subpixel import upsample
from sana_sprint.models.dc_blocks import UpBlock
from sana_sprint.quantize.formats import PRESETS, decode, encode, storage
from sana_sprint.quantize.matmul import fp8_rows, int8_convolution, int8_rows


class QuantizedLayer(nn.Module):
    """A layer with codes and scales instead of a weight of `shape`; the scale's dtype is the layer's.

    A file holds `codes`, `scale` and, if the layer has one, `bias`.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d, preset: str) -> None:
        """Uninitialised codes for a layer of the same shape; see `of`."""
        super().__init__()
        weight = layer.weight
        self.preset = preset
        self.shape = tuple(weight.shape)
        codes, kind, scale = storage(preset, weight.shape[0], weight[0].numel())
        self.register_buffer("codes", torch.empty(codes, dtype=kind))
        self.register_buffer("scale", torch.empty(scale, dtype=weight.dtype))
        self.bias = layer.bias
        self._packed: tuple[int, Tensor] | None = None

    @classmethod
    def of(cls, layer: nn.Linear | nn.Conv2d, preset: str) -> Self:
        """A quantised copy of the layer."""
        quantized = cls(layer, preset)
        codes, scale = encode(layer.weight.detach().flatten(1), preset)
        quantized.codes = codes
        quantized.scale = scale.to(layer.weight.dtype)
        return quantized.train(layer.training)

    @property
    def weight(self) -> Tensor:
        """The dequantised weight, computed at each access."""
        return decode(self.codes, self.scale, self.preset).view(self.shape)

    def extra_repr(self) -> str:
        return f"{self.shape}, {self.preset}"

    def rows(self, x: Tensor) -> Tensor:
        """The layer as a linear map of the last axis."""
        if not PRESETS[self.preset].rounds_activations:
            return F.linear(x, self.weight.flatten(1), self.bias)
        flat, scale = x.reshape(-1, x.shape[-1]), self.scale.flatten()
        if self.preset == "fp8":
            out = fp8_rows(flat, self.codes, scale)
            out = out if self.bias is None else out + self.bias
        else:
            packed = self.packed(torch_private.pack_linear) if x.device.type == "cpu" else None
            out = int8_rows(flat, self.codes, packed, scale, self.bias)
        return out.view(*x.shape[:-1], -1)

    def packed(self, pack: Callable[[Tensor], Tensor]) -> Tensor:
        """The codes in the memory order of a kernel, packed once and again when they have moved."""
        place = self.codes.data_ptr()
        if self._packed is None or self._packed[0] != place:
            self._packed = place, pack(self.codes)
        return self._packed[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # opaque tensors can be neither copied nor pickled


class QuantizedLinear(QuantizedLayer):
    """Replaces `nn.Linear`, and the transformer's 1x1 convolutions, which act on tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return self.rows(x)


class QuantizedConv2d(QuantizedLayer):
    """Replaces a convolution without groups or dilation, (B,C,H,W) -> (B,outputs,H',W')."""

    def __init__(self, layer: nn.Conv2d, preset: str) -> None:
        super().__init__(layer, preset)
        self.stride, self.padding = list(layer.stride), [int(side) for side in layer.padding]

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.padding)

    def convolve(self, x: Tensor, padding: Sequence[int]) -> Tensor:
        """`forward` with another zero padding."""
        if self.shape[2:] == (1, 1):  # a map of pixels, each rounded on its own
            return self.rows(x.movedim(1, -1)).movedim(-1, 1)
        if self.preset != "int8":
            return F.conv2d(x, self.weight, self.bias, self.stride, tuple(padding))
        scale = self.scale.flatten()
        packed = self.packed(
            lambda codes: torch_private.pack_convolution(codes.view(self.shape), scale, self.stride)
        )
        return int8_convolution(x, packed, scale, self.bias, self.stride, padding)


class QuantizedPhases(QuantizedConv2d):
    """Replaces an `UpBlock`'s convolution: of the kernels of `subpixel.phase_convolution`, see `QuantizedUpBlock`.

    Those of the phases rather than the one they are sums of: rounded once, and without its weight the large grid would have
    to be convolved, in 9/4 of the operations.
    """


class QuantizedUpBlock(UpBlock):
    """An `UpBlock` whose convolution is `QuantizedPhases`."""

    def forward(self, x: Tensor) -> Tensor:
        return upsample(x, self.conv, self.out_channels, self.repeats if self.shortcut else None)
