"""The part that every pipeline shares: noise to latents by the transformer, latents to a picture by the autoencoder."""

from __future__ import annotations

import copy
import logging
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sana_sprint.images import resize_and_crop
from sana_sprint.models.transformer import CaptionContext
from sana_sprint.numerics import check_finite, draw_noise, image_seeds, make_generators, send
from sana_sprint.pipelines.prompting import TextInputs
from sana_sprint.resolutions import Size, cover
from sana_sprint.sampling import sample
from sana_sprint.trigflow import flow_denoiser

logger = logging.getLogger(__name__)

Generators = torch.Generator | Sequence[torch.Generator]

MAX_TILE = 1024  # pixels; of tiles that are chosen here, when memory ran out


# ----- a call's numbers, one per image --------------------------------------------------------------------------------


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


# ----- noise to latents -----------------------------------------------------------------------------------------------


@dataclass
class Conditioning:
    """What the transformer knows besides the noisy latent. Belongs to one call; captions are projected once for it."""

    transformer: Any
    text: TextInputs  # one row per image
    context: CaptionContext
    guidance: Tensor | None  # (B,) fp32

    @classmethod
    def of(
        cls, transformer: Any, text: TextInputs, repeats: int, guidance: tuple[float, ...] | None
    ) -> Conditioning:
        """From one row of text per prompt, with `repeats` images each, and one guidance scale per image."""
        device = transformer.device
        text = text.to(device)
        context = transformer.encode_caption(text.embeds, text.mask)
        return cls(
            transformer=transformer,
            text=text.repeat(repeats),
            context=context if repeats == 1 else context.repeat(repeats),
            guidance=None if guidance is None else send(torch.tensor(guidance, dtype=torch.float32), device),
        )

    def conditions(self) -> tuple[Image.Image, ...]:
        """The pictures that are followed, one per image."""
        return ()

    def replace_text(self, embeds: Tensor) -> None:
        """Go on with other embeddings (B,L,D) under the same mask."""
        self.text = replace(self.text, embeds=embeds.to(self.transformer.device))
        self.context = self.transformer.encode_caption(self.text.embeds, self.text.mask)

    def velocity(self, x: Tensor, flow_t: Tensor) -> Tensor:
        """The flow model, fp32 in and out."""
        v: Tensor = self.transformer(x, flow_t, self.context, self.guidance)
        return v


Steer = Callable[[Conditioning], Conditioning]
# (prompts, images per prompt, size, times) of a call, all checked -> what else its conditioning is to hold
Steering = Callable[[int, int, Size, Sequence[float]], Steer]


def by_text_alone(num_prompts: int, repeats: int, size: Size, times: Sequence[float]) -> Steer:
    """The steering of a pipeline that has nothing to follow but the prompt."""
    return lambda conditioning: conditioning


def draw_latents(
    conditioning: Conditioning,
    noise: Tensor,
    times: Sequence[float],
    generators: Generators,
    *,
    on_step: Callable[[int, float, Tensor], Tensor | None],
) -> Tensor:
    """Clean latents (B,C,h,w) of unit variance, in fp32 whatever the weights are.

    Raises:
        NonFiniteError: naming the step.
    """
    num_steps = len(times) - 1

    def check_step(i: int, t: float, u: Tensor) -> Tensor | None:
        return on_step(i, t, check_finite(u, f"step {i + 1} of {num_steps}"))

    return sample(
        flow_denoiser(conditioning.velocity),
        check_finite(noise, "latents"),
        times,
        draw_noise=lambda: draw_noise(noise.shape, generators, device=noise.device),
        on_step=check_step,
    )


# ----- pictures to latents and back -----------------------------------------------------------------------------------


def encode(vae: Any, pictures: Tensor) -> Tensor:
    """Pictures (B,3,H,W) in [-1,1] -> latents (B,C,h,w) of unit variance, fp32.

    Raises:
        NonFiniteError: if the latents hold NaN or infinity.
    """
    raw = check_finite(vae.encode(pictures.to(vae.device, vae.dtype)), "the autoencoder's encoder")
    scale: float = vae.config.scaling_factor
    return raw.float() * scale


def decode(vae: Any, u0: Tensor) -> Tensor:
    """Clean latents (B,C,h,w) of unit variance -> pictures (B,3,H,W), about [-1,1], fp32.

    If memory runs out, once more with slicing and tiling, for this call only and with a warning in the log.

    Raises:
        MemoryError: if that does not fit either.
        NonFiniteError: if the pictures hold NaN or infinity.
    """
    latent = (u0 / vae.config.scaling_factor).to(vae.device, vae.dtype)
    try:
        images = vae.decode(latent)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        images = None  # retried outside this block, which keeps the failed call's tensors alive
    if images is None:
        logger.warning("not enough memory to decode in one piece; decoding one by one in tiles instead")
        images = _decode_frugally(vae, latent)
    return check_finite(images, "the autoencoder's decoder").float()


def _decode_frugally(vae: Any, latent: Tensor) -> Tensor:
    """One by one, in tiles of half the longer side (or of the tiles there were), 1024 pixels at most."""
    # A copy shares the weights; the original keeps its settings, which other threads rely on.
    frugal = copy.copy(vae)
    ratio = vae.spatial_compression_ratio
    longest = max(latent.shape[2:] if vae.tiling is None else vae.tiling.tile)
    frugal.enable_slicing()
    frugal.enable_tiling(min(-(-longest // 2), max(1, MAX_TILE // ratio)) * ratio)
    try:
        images: Tensor = frugal.decode(latent)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        height, width = latent.shape[2] * ratio, latent.shape[3] * ratio
        raise MemoryError(
            f"not enough memory on {latent.device} to decode {latent.shape[0]} pictures of {height}x{width}, not even "
            "one by one in tiles: ask for smaller pictures, call enable_vae_tiling with smaller tiles, or free memory "
            "(output_type='latent' leaves the decoding to you)"
        ) from error
    return images


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    message = str(error).lower()  # the CPU's and some other allocators raise plain RuntimeErrors
    return isinstance(error, RuntimeError) and (
        "out of memory" in message
        or "not enough memory" in message
        or "can't allocate memory" in message
        or "cannot allocate memory" in message
    )


def fit(images: Tensor, size: Size) -> Tensor:
    """Pictures of the model's size -> pictures of the size that was asked for."""
    height, width = images.shape[-2:]
    plan = cover(height, width, size.height, size.width)
    return resize_and_crop(
        images,
        resized=(plan.height, plan.width),
        corner=(plan.top, plan.left),
        size=(size.height, size.width),
    )
