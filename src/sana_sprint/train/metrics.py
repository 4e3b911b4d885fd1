"""Measurements that several stages log."""

from __future__ import annotations

from torch import Tensor

Metrics = dict[str, float]


NUM_LEVELS = 4


def by_level(name: str, values: Tensor, level: Tensor) -> Metrics:
    """Means in each quarter of the noise levels, "<name>_t0" (little noise) to "<name>_t3"; empty quarters are left out.

    Args:
        name: of the measurement.
        values: of each sample (B,).
        level: its noise level (B,), from 0 (data) to 1 (noise).
    """
    quarter = (level * NUM_LEVELS).long().clamp(0, NUM_LEVELS - 1).tolist()
    found: dict[int, list[float]] = {}
    for number, value in zip(quarter, values.tolist(), strict=True):
        found.setdefault(number, []).append(value)
    return {f"{name}_t{number}": sum(each) / len(each) for number, each in sorted(found.items())}
