"""Measurements that several stages log."""

from __future__ import annotations

from torch import Tensor

from sana_sprint.train.stage import Metrics

NUM_LEVELS = 4


def loss_by_level(losses: Tensor, level: Tensor) -> Metrics:
    """Mean loss in each quarter of the noise levels, "loss_t0" (little noise) to "loss_t3"; empty quarters are left out.

    Args:
        losses: loss of each sample (B,).
        level: its noise level (B,), from 0 (data) to 1 (noise).
    """
    quarter = (level * NUM_LEVELS).long().clamp(0, NUM_LEVELS - 1).tolist()
    found: dict[int, list[float]] = {}
    for number, loss in zip(quarter, losses.tolist(), strict=True):
        found.setdefault(number, []).append(loss)
    return {f"loss_t{number}": sum(values) / len(values) for number, values in sorted(found.items())}
