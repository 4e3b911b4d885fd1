"""Noise to latents, by the transformer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sana_sprint.models.transformer import CaptionContext
from sana_sprint.noise import draw_noise
from sana_sprint.pipelines.inputs import Generators
from sana_sprint.pipelines.text import TextInputs
from sana_sprint.precision import check_finite, send
from sana_sprint.resolutions import Size
from sana_sprint.sampling import sample
from sana_sprint.trigflow import flow_denoiser


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
