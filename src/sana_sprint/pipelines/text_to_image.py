"""Text to pictures: `SanaSprintPipeline`, with the arguments of the published pipeline of that name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sana_sprint.pipelines.callbacks import StepCallback
from sana_sprint.pipelines.generate import SprintPipeline
from sana_sprint.pipelines.inputs import Call, Generators
from sana_sprint.pipelines.output import Pictures, SanaSprintOutput
from sana_sprint.prompts import COMPLEX_HUMAN_INSTRUCTION, DEFAULT_MAX_SEQUENCE_LENGTH
from sana_sprint.sampling import PUBLISHED_GUIDANCE, PUBLISHED_INTERMEDIATE, PUBLISHED_MAX
from sana_sprint.stopping import ShouldStop

__all__ = ["SanaSprintOutput", "SanaSprintPipeline"]


class SanaSprintPipeline(SprintPipeline):
    """Draws pictures from text in 1 to 4 (or more) network evaluations.

    Calls change nothing about the pipeline or its components, so several threads may call at once. `guidance_scale`,
    `attention_kwargs`, `num_timesteps`, `interrupt` and `_interrupt` belong to a call, see `CallAttributes`.

    Arguments of a call, in the published order:
        prompt: a string or a list of strings. An empty string is allowed (no text).
        num_inference_steps: network evaluations, from 1 up.
        timesteps: TrigFlow angles instead, falling, in [0, 1.5708]; a final 0 may be left out. They decide the number
            of steps, and the next two arguments cannot be given along.
        max_timesteps: the first angle.
        intermediate_timesteps: the second of two angles, or None for equal distances in any number of steps, as published.
            Left out, steps other than 2 have the paper's times. docs/math.md has a table of all cases.
        guidance_scale: one number, one per prompt or one per image; the model was distilled with 4 to 5. None for a
            transformer without guidance embedding.
        num_images_per_prompt: all images of the first prompt come first.
        height, width: of the pictures, in pixels; the model's native size by default.
        eta: accepted, without effect (the published pipeline has it for other samplers).
        generator: one for the whole batch, as published, or one per image. Instead of `seed`. It draws as often as in the
            published pipeline, so that several calls with one generator give the same pictures there and here.
        latents: initial noise (B,C,h,w) of unit variance, where h and w are the model's size over `vae_scale_factor`.
        prompt_embeds, prompt_attention_mask: embeddings (prompts,L,D) and mask (prompts,L) instead of `prompt`.
        output_type: "pil", "np", "pt" or "latent", see `SanaSprintOutput`.
        return_dict: False gives the tuple `(images,)`.
        clean_caption: remove markup, links and odd characters from the prompts, as for captions from the web; without ftfy and
            beautifulsoup4 the prompts stay as they are, as published, which is logged once.
        use_resolution_binning: draw at the trained size of the nearest aspect ratio, then resize and crop. False
            draws the size itself, which must be a multiple of the pixels per token.
        attention_kwargs: {"scale": x} multiplies the loaded LoRAs by x in this call; the weights for the last x are kept.
        callback_on_step_end: called after each step as `callback(pipeline, i, t, tensors)`; may return a dict of
            tensors to continue with. After the last step they have no effect, as published. `pipeline._interrupt = True`
            ends the call after this step, with the picture as it then is; an exception ends it without one.
        callback_on_step_end_tensor_inputs: the names in `tensors`: "latents" (B,C,h,w), as published in data space (half
            of unit variance), and "prompt_embeds" (B,max_sequence_length,D), one row per image. A callback object's own
            `tensor_inputs` take precedence.
        max_sequence_length: text tokens per prompt at most. A longer prompt is cut, which is logged and reported.
        complex_human_instruction: lines put before every prompt; the published ones by default, None for none.
        seed: a number, for image i of the batch seed + i, or one per image. If neither this nor `generator` is given, it is
            drawn from torch's global generator (so `torch.manual_seed` makes a call repeatable) and reported. Image i is
            the same picture whether it is made alone or in a batch.
        should_stop: asked before each step, each tile and each picture that is decoded. If it returns True, the call ends
            with `sana_sprint.Stopped`.

    Raises:
        ValueError: for a bad argument, naming its value and what is allowed, before any computing.
        NonFiniteError: if NaN or infinity turns up, naming the stage.
        MemoryError: if the pictures cannot be decoded in the available memory, not even in tiles.
        Stopped: if `should_stop` returned True.
    """

    published_class_name = "SanaSprintPipeline"

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 2,
        timesteps: Sequence[float] | Tensor | None = None,
        max_timesteps: float | None = PUBLISHED_MAX,
        intermediate_timesteps: float | None = PUBLISHED_INTERMEDIATE,
        guidance_scale: float | Sequence[float] | Tensor | None = PUBLISHED_GUIDANCE,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        clean_caption: bool = False,
        use_resolution_binning: bool = True,
        attention_kwargs: Mapping[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
        max_sequence_length: int = DEFAULT_MAX_SEQUENCE_LENGTH,
        complex_human_instruction: Sequence[str] | None = COMPLEX_HUMAN_INSTRUCTION,
        *,
        seed: int | Sequence[int] | None = None,
        should_stop: ShouldStop | None = None,
    ) -> SanaSprintOutput | tuple[Pictures]:
        """See the class for arguments and errors."""
        return self._generate(
            Call(
                prompt=prompt,
                num_inference_steps=num_inference_steps,
                timesteps=timesteps,
                max_timesteps=max_timesteps,
                intermediate_timesteps=intermediate_timesteps,
                guidance_scale=guidance_scale,
                num_images_per_prompt=num_images_per_prompt,
                height=height,
                width=width,
                generator=generator,
                latents=latents,
                prompt_embeds=prompt_embeds,
                prompt_attention_mask=prompt_attention_mask,
                output_type=output_type,
                return_dict=return_dict,
                clean_caption=clean_caption,
                use_resolution_binning=use_resolution_binning,
                attention_kwargs=attention_kwargs,
                callback_on_step_end=callback_on_step_end,
                callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
                max_sequence_length=max_sequence_length,
                complex_human_instruction=complex_human_instruction,
                seed=seed,
                should_stop=should_stop,
            )
        )
