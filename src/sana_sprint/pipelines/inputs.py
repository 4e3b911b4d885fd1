"""The numbers of a call, checked and spread over its images."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sana_sprint.models.transformer import SanaTransformer2DModel
from sana_sprint.noise import image_seeds, make_generators
from sana_sprint.resolutions import Size
from sana_sprint.stopping import ShouldStop

Generators = torch.Generator | Sequence[torch.Generator]


@dataclass(frozen=True, kw_only=True)
class Call:
    """The arguments that every pipeline's call has, see `SanaSprintPipeline`. Nothing is checked yet."""

    prompt: str | Sequence[str] | None
    num_inference_steps: int
    timesteps: Sequence[float] | Tensor | None
    max_timesteps: float | None
    intermediate_timesteps: float | None
    guidance_scale: float | Sequence[float] | Tensor | None
    num_images_per_prompt: int
    height: int | None
    width: int | None
    generator: Generators | None
    latents: Tensor | None
    prompt_embeds: Tensor | None
    prompt_attention_mask: Tensor | None
    output_type: str
    return_dict: bool
    clean_caption: bool
    use_resolution_binning: bool
    attention_kwargs: Mapping[str, Any] | None
    callback_on_step_end: Callable[..., Any] | None
    callback_on_step_end_tensor_inputs: Sequence[str] | None
    max_sequence_length: int
    complex_human_instruction: Sequence[str] | None
    seed: int | Sequence[int] | None
    should_stop: ShouldStop | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The checked shape of a call: `num_prompts` prompts with `repeats` images each, in this size, at these angles."""

    num_prompts: int
    repeats: int
    size: Size
    times: tuple[float, ...]

    @property
    def num_images(self) -> int:
        """Images of the call."""
        return self.num_prompts * self.repeats

    @property
    def num_steps(self) -> int:
        """Steps of the sampler."""
        return len(self.times) - 1


def choose_generators(
    seed: int | Sequence[int] | None, generator: Generators | None, count: int
) -> tuple[Generators, tuple[int, ...] | None]:
    """The generators of the noise of `count` images, and their seeds (None if the caller gave generators).

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
    transformer: SanaTransformer2DModel,
    scale: float | Sequence[float] | Tensor | None,
    num_prompts: int,
    repeats: int,
) -> tuple[float, ...] | None:
    """Guidance scales, one per image; None for a model that embeds none.

    Args:
        transformer: its config says whether it embeds a guidance scale.
        scale: one for all, one per prompt, or one per image (each prompt's images together).
        num_prompts: the number of prompts.
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
