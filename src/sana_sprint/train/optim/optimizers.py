"""Optimisers and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from sana_sprint.train.optim.came import CAME
from sana_sprint.train.sections import OptimizerConfig

Named = Sequence[tuple[str, Tensor]]


def make_optimizers(named: Named, config: OptimizerConfig) -> list[Optimizer]:
    """The optimisers of named parameters, none of them without parameters.

    - adamw: AdamW.
    - adamw8bit: AdamW with its two averages in 8 bits, from bitsandbytes.
    - came: CAME, which keeps one average and the row and column means of two more.
    - muon: Muon for hidden matrices, AdamW for the rest. Embeddings, the first and last layers, vectors and convolutions
      stay with AdamW: Muon's orthogonalised update is meant for matrices that map hidden features to hidden features.

    Weights of fewer than two dimensions do not decay.

    Raises:
        ImportError: the optimiser needs a package that is not installed.
    """
    if config.name != "muon":
        return _elementwise(named, config)
    hidden = [p for name, p in named if p.ndim == 2 and min(p.shape) > 32 and "embed" not in name]
    chosen = {id(p) for p in hidden}
    rest = _elementwise([(name, p) for name, p in named if id(p) not in chosen], config)
    if not hidden:
        return rest
    muon = Muon(
        hidden,
        lr=config.matrix_learning_rate,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return [muon, *rest]


def rate(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Multiplier of the learning rate at a step: linear warm-up, constant, then decay to zero."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    decay_steps = config.decay_fraction * num_steps
    left = min(1.0, (num_steps - step) / decay_steps) if decay_steps > 0 else 1.0
    return warmup * (left if config.decay == "linear" else 0.5 - 0.5 * math.cos(math.pi * left))


def warmed_up(step: int, warmup_steps: int) -> float:
    """A factor that grows from 0 to 1 over so many steps, and stays."""
    return min(1.0, step / max(1, warmup_steps))


def set_rate(optimizers: Sequence[Optimizer], base_rates: Sequence[float], multiplier: float) -> None:
    """Sets every group's rate to its optimiser's base rate times the multiplier."""
    for optimizer, base in zip(optimizers, base_rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = base * multiplier


def clip(parameters: Sequence[Tensor], norm: float) -> float:
    """Scales gradients to at most the given total norm; returns the norm before."""
    return float(nn.utils.clip_grad_norm_(list(parameters), norm))


def _elementwise(named: Named, config: OptimizerConfig) -> list[Optimizer]:
    """AdamW, its 8-bit form or CAME, with and without weight decay; nothing where there is no parameter."""
    matrices, vectors = [p for _, p in named if p.ndim > 1], [p for _, p in named if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((matrices, config.weight_decay), (vectors, 0.0))
        if parameters
    ]
    if not groups:
        return []
    if config.name == "came":
        return [CAME(groups, lr=config.learning_rate, betas=(*config.betas, config.confidence_beta))]
    if config.name == "adamw8bit":
        return [_adamw8bit(groups, config)]
    # fused: one pass over a parameter and its states, on every device (a quarter of the plain loop's time on a CPU).
    return [AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)]


def _adamw8bit(groups: list[dict[str, Any]], config: OptimizerConfig) -> Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        message = 'optimizer "adamw8bit" needs bitsandbytes: pip install "sana-sprint[train]"'
        raise ImportError(message, name="bitsandbytes") from error
    optimizer: Optimizer = AdamW8bit(groups, lr=config.learning_rate, betas=config.betas)
    return optimizer
