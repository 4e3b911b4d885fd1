"""A call's numbers, one per image: generators, counts and guidance scales."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sana_sprint.noise import image_seeds, make_generators

Generators = torch.Generator | Sequence[torch.Generator]


def choose_generators(
    seed: int | Sequence[int] | None, generator: Generators | None, count: int
) -> tuple[Generators, tuple[int, ...] | None]:
    """Where the noise of `count` images comes from, and their seeds (None if the caller's generators decide).

    Raises:
        ValueError: if both are given, or a sequence has another length than `count`.
    """
    if generator is None:
        seeds = image_seeds(seed, count)
        return make_generators(seeds), tuple(seeds)
    if seed is not None:
        raise ValueError("give either seed or generator, not both")
    if isinstance(generator, torch.Generator):
        return generator, None
    if len(generator) != count:
        raise ValueError(f"generator must be one or one per image, {count} here; got: {len(generator)}")
    return list(generator), None


def check_count(name: str, value: int) -> int:
    """`value` as a whole number from 1 up, or ValueError."""
    try:
        count = operator.index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"{name} must be a whole number from 1 up, got: {value!r}")
    return count


def guidance_per_image(
    transformer: Any, scale: float | Sequence[float] | Tensor | None, num_prompts: int, repeats: int
) -> tuple[float, ...] | None:
    """Guidance scales, one per image; None for a model that embeds none.

    Args:
        transformer: its config says whether it embeds a guidance scale.
        scale: one for all, one per prompt, or one per image (each prompt's images together).
        num_prompts: how many prompts there are.
        repeats: images per prompt.

    Raises:
        ValueError: for another number of scales, one that is negative or not finite, and for a scale that the model
            cannot honour or lacks.
    """
    if not transformer.config.guidance_embeds:
        if scale is not None:
            raise ValueError(
                "guidance_scale has no effect on this transformer (guidance_embeds is False): pass None"
            )
        return None
    if scale is None:
        raise ValueError("guidance_scale must be a number for this transformer, such as 4.5; got: None")
    try:
        scales = [float(value) for value in (scale if isinstance(scale, Iterable) else [scale])]
    except (TypeError, ValueError):
        raise ValueError(f"guidance_scale must be a number or a list of numbers, got: {scale!r}") from None
    if len(scales) == 1:
        scales *= num_prompts * repeats
    elif len(scales) == num_prompts:
        scales = [value for value in scales for _ in range(repeats)]
    if len(scales) != num_prompts * repeats:
        raise ValueError(
            f"guidance_scale must be one number, one per prompt ({num_prompts}) or one per image "
            f"({num_prompts * repeats}); got: {len(scales)}"
        )
    if wrong := [value for value in scales if not 0 <= value < float("inf")]:
        raise ValueError(f"guidance_scale must be finite and at least 0, got: {wrong[0]}")
    return tuple(scales)
