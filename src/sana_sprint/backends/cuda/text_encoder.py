"""Gemma 2's norms as fused kernels: nine launches of ten for each of a hundred norms are saved.

A prompt's tokens are few, so that launches and not arithmetic take the time.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from sana_sprint.backends.cuda import transformer as fused

_NORM = "Gemma2RMSNorm"


def use_fused_norms(model: nn.Module, enabled: bool) -> None:
    """Have a `Gemma2Model` use the fused kernel for its norms where it applies, or never.

    Raises:
        ValueError: if enabled and Triton is not installed.
    """
    if enabled:
        fused.check_triton()
    for module in model.modules():
        if type(module).__name__ == _NORM:
            if enabled:
                module.forward = partial(_norm, module)  # this module's alone
            else:
                module.__dict__.pop("forward", None)


def _norm(module: nn.Module, x: Tensor) -> Tensor:
    from sana_sprint.backends.cuda.kernels.norms import rms_norm

    weight, eps = module.weight, module.eps
    assert isinstance(weight, Tensor)
    assert isinstance(eps, float)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not fused.runs_on(x.device):
        out: Tensor = type(module).forward(module, x)
        return out
    with fused.on_device(x):
        return rms_norm(x.contiguous(), weight, eps, offset=1.0)
