"""Gemma 2's norms as fused kernels: nine launches of ten for each of a hundred norms are saved.

A prompt's tokens are few, so that launches and not arithmetic take the time. Imports transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.gemma2 import modeling_gemma2

from sana_sprint.backends.cuda import device

_PlainNorm: Any = modeling_gemma2.Gemma2RMSNorm  # transformers leaves it untyped


class Gemma2RMSNorm(_PlainNorm):  # type: ignore[misc]
    weight: Tensor
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not device.runs_on(x.device):
            out: Tensor = super().forward(x)
            return out
        from sana_sprint.backends.cuda.kernels.norms import rms_norm

        with device.on_device(x):
            return rms_norm(x.contiguous(), self.weight, self.eps, offset=1.0)


CLASSES = {_PlainNorm: Gemma2RMSNorm}
