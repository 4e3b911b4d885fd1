"""Optimisers and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from sana_sprint.train.config import OptimizerConfig


def make_optimizers(module: nn.Module, config: OptimizerConfig) -> list[Optimizer]:
    """AdamW over everything, or Muon over hidden matrices and AdamW over the rest.

    Embeddings, the first and last layers, vectors and convolutions stay with AdamW: Muon's orthogonalised
    update is meant for matrices that map hidden features to hidden features.
    """
    adam: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.betas,
        "weight_decay": config.weight_decay,
    }
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if config.name == "adamw":
        return [AdamW([p for _, p in named], **adam)]
    matrices = [p for name, p in named if p.ndim == 2 and min(p.shape) > 32 and "embed" not in name]
    chosen = {id(p) for p in matrices}
    muon = Muon(
        matrices,
        lr=config.matrix_learning_rate,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return [muon, AdamW([p for _, p in named if id(p) not in chosen], **adam)]


def rate(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Multiplier of the learning rate at a step: linear warm-up, constant, linear decay to zero."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    decay_steps = config.decay_fraction * num_steps
    decay = min(1.0, (num_steps - step) / decay_steps) if decay_steps > 0 else 1.0
    return warmup * decay


def set_rate(optimizers: Sequence[Optimizer], base_rates: Sequence[float], multiplier: float) -> None:
    """Sets every group's rate to its optimiser's base rate times the multiplier."""
    for optimizer, base in zip(optimizers, base_rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = base * multiplier


def clip(parameters: Sequence[torch.Tensor], norm: float) -> float:
    """Scales gradients to at most the given total norm; returns the norm before."""
    return float(nn.utils.clip_grad_norm_(list(parameters), norm))
