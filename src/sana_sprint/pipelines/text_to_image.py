"""Text to pictures: `SanaSprintPipeline`, with the arguments of the published pipeline of that name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sana_sprint.backends.cpu.allocator import freed_memory_kept
from sana_sprint.models.text_encoder import PromptEmbeddings
from sana_sprint.noise import draw_noise
from sana_sprint.pipelines.base import BasePipeline
from sana_sprint.pipelines.callbacks import StepCallback, StepHook, check_tensor_inputs
from sana_sprint.pipelines.control import ControlInput
from sana_sprint.pipelines.denoise import Conditioning, denoise
from sana_sprint.pipelines.inputs import (
    Call,
    Generators,
    Plan,
    check_count,
    choose_generators,
    guidance_per_image,
)
from sana_sprint.pipelines.latents import decode, fit
from sana_sprint.pipelines.output import Pictures, SanaSprintOutput, check_output_type, convert
from sana_sprint.pipelines.start import Start, from_noise
from sana_sprint.pipelines.text import Prompts
from sana_sprint.precision import check_dtype, dtype_name, finite_checks_later
from sana_sprint.prompts import COMPLEX_HUMAN_INSTRUCTION, DEFAULT_MAX_SEQUENCE_LENGTH
from sana_sprint.resolutions import Size, plan_size
from sana_sprint.sampling import PUBLISHED_GUIDANCE, PUBLISHED_INTERMEDIATE, PUBLISHED_MAX, schedule
from sana_sprint.stopping import ShouldStop

if TYPE_CHECKING:
    from transformers import Gemma2Model, PreTrainedTokenizerBase

    from sana_sprint.models.autoencoder import AutoencoderDC
    from sana_sprint.models.transformer import SanaTransformer2DModel
    from sana_sprint.scheduler import SCMScheduler

_MANY_PIXELS = 512 * 512  # below it, memory that the allocator returns is soon asked for again

__all__ = ["SanaSprintOutput", "SanaSprintPipeline"]


class SanaSprintPipeline(BasePipeline):
    """Draws pictures from text in 1 to 4 (or more) network evaluations.

    Calls change nothing about the pipeline or its components, so several threads may call at once.

    Arguments of a call, in the published order:
        prompt: a string or a list of strings. An empty string is allowed (no text).
        num_inference_steps: network evaluations, from 1 up.
        timesteps: TrigFlow angles instead, falling, in [0, 1.5708]; a final 0 may be left out. They decide the number
            of steps; the next two arguments are then not used.
        max_timesteps: the first angle.
        intermediate_timesteps: the second of two angles. Not used for other numbers of steps.
        guidance_scale: one number, one per prompt or one per image; the model was distilled with 4 to 5. None for a
            transformer without guidance embedding.
        num_images_per_prompt: all images of the first prompt come first.
        height, width: of the pictures, in pixels; the model's native size by default.
        eta: accepted, without effect (the published pipeline has it for other samplers).
        generator: one for the whole batch, as published, or one per image. Instead of `seed`.
        latents: initial noise (B,C,h,w) of unit variance, where h and w are the model's size over `vae_scale_factor`.
        prompt_embeds, prompt_attention_mask: embeddings (prompts,L,D) and mask (prompts,L) instead of `prompt`.
        output_type: "pil", "np", "pt" or "latent", see `SanaSprintOutput`.
        return_dict: False gives the tuple `(images,)`.
        clean_caption: clean the prompts of what captions from the web bring along; needs ftfy and beautifulsoup4.
        use_resolution_binning: draw at the trained size of the nearest aspect ratio, then resize and crop. False
            draws the size itself, which must be a multiple of the pixels per token.
        attention_kwargs: {"scale": x} multiplies the loaded LoRAs by x in this call; the weights for the last x are kept.
        callback_on_step_end: called after each step as `callback(pipeline, i, t, tensors)`; may return a dict of
            tensors to go on with. An exception it raises ends the call.
        callback_on_step_end_tensor_inputs: what `tensors` holds: "latents" (B,C,h,w), as published in data space (half
            of unit variance), and "prompt_embeds" (B,L,D), one row per image.
        max_sequence_length: text tokens per prompt at most. A longer prompt is cut, which is logged and reported.
        complex_human_instruction: lines put before every prompt; the published ones by default, None for none.
        seed: a number, for image i of the batch seed + i, or one per image. Random, and reported, if neither this nor
            `generator` is given. Image i is the same picture whether it is made alone or in a batch.
        should_stop: asked before each step, each tile and each picture that is decoded. If it returns True, the call ends
            with `stopping.Stopped`.

    Raises:
        ValueError: for a bad argument, naming its value and what is allowed, before any computing.
        NonFiniteError: if NaN or infinity turns up, naming the stage.
        MemoryError: if the pictures cannot be decoded in the memory there is, not even in tiles.
    """

    published_class_name = "SanaSprintPipeline"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        text_encoder: Gemma2Model | None,
        vae: AutoencoderDC | None,
        transformer: SanaTransformer2DModel | None,
        scheduler: SCMScheduler | None,
    ) -> None:
        super().__init__(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            transformer=transformer,
            scheduler=scheduler,
        )

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
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
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

    def _generate(
        self, call: Call, controls: Sequence[ControlInput] = ()
    ) -> SanaSprintOutput | tuple[Pictures]:
        """Checks a call, encodes its text and controls, samples latents and decodes them."""
        self.need("transformer", "scheduler", *(["vae"] if call.output_type != "latent" or controls else []))
        self._check_dtypes()
        check_output_type(call.output_type)
        check_tensor_inputs(call.callback_on_step_end_tensor_inputs)
        transformer = self._transformer_at(call.attention_kwargs)
        prompts = Prompts(call.prompt, call.prompt_embeds, call.prompt_attention_mask)
        repeats = check_count("num_images_per_prompt", call.num_images_per_prompt)
        guidance = guidance_per_image(transformer, call.guidance_scale, prompts.count, repeats)
        times = schedule(
            call.num_inference_steps,
            timesteps=call.timesteps,
            max_timesteps=call.max_timesteps,
            intermediate_timesteps=call.intermediate_timesteps,
        )
        size = self._plan_size(call.height, call.width, call.use_resolution_binning)
        plan = Plan(num_prompts=prompts.count, repeats=repeats, size=size, times=tuple(times))
        generators, seeds = choose_generators(call.seed, call.generator, plan.num_images)
        shape = self._latent_shape(plan, call.latents)
        prepared = [control.prepare(plan) for control in controls]
        with self._computing(shape[0] * size.model_pixels, call.callback_on_step_end):
            text = self._encode(prompts, call)
            start = from_noise(
                self._noise(call.latents, shape, generators), times
            )  # while a GPU encodes text
            conditioning = Conditioning.of(transformer, text, repeats, guidance)
            conditioning.controls = tuple(control.encode(conditioning, repeats) for control in prepared)
            u0 = self._denoise(conditioning, start, generators, call)
            self._give_back("transformer", "controlnet")
            pixels = None if call.output_type == "latent" else decode(self.vae, u0, call.should_stop)
        images = u0 if pixels is None else convert(fit(pixels, size), call.output_type)
        self._give_back("vae")
        output = SanaSprintOutput.of(
            images,
            size,
            seeds=seeds,
            times=start.times,
            guidance=guidance,
            dtype=dtype_name(self.dtype),
            lost_tokens=text.lost_tokens,
            conditions=tuple(picture for control in prepared for picture in control.pictures()),
        )
        return output if call.return_dict else (images,)

    @contextmanager
    def _computing(self, pixels: int, callback: StepCallback | None) -> Iterator[None]:
        """Context for one call: deferred finite checks and, on a CPU, malloc settings."""
        on_cpu = self.device.type == "cpu"
        with (
            finite_checks_later(callback is None),  # a callback must see checked tensors only
            freed_memory_kept(on_cpu and pixels >= _MANY_PIXELS),
        ):
            yield

    def _encode(self, prompts: Prompts, call: Call) -> PromptEmbeddings:
        text = prompts.encode(
            self.prompt_encoder, call.clean_caption, call.max_sequence_length, call.complex_human_instruction
        )
        self._give_back("text_encoder")
        return text

    def _check_dtypes(self) -> None:
        for name in self._modules():
            check_dtype(name, getattr(self, name).dtype)

    def _plan_size(self, height: int | None, width: int | None, use_binning: bool) -> Size:
        return plan_size(
            height,
            width,
            native=self.native_size,
            multiple=self.transformer.config.patch_size * self.vae_scale_factor,
            use_binning=use_binning,
        )

    def _latent_shape(self, plan: Plan, latents: Tensor | None) -> tuple[int, ...]:
        """(B,C,h,w), which the caller's latents must have."""
        ratio, size = self.vae_scale_factor, plan.size
        channels = self.transformer.config.in_channels
        shape = (plan.num_images, channels, size.model_height // ratio, size.model_width // ratio)
        if latents is not None and latents.shape != shape:
            raise ValueError(f"latents must be of shape {shape} for this call, got: {tuple(latents.shape)}")
        return shape

    def _noise(self, latents: Tensor | None, shape: tuple[int, ...], generators: Generators) -> Tensor:
        """Initial noise of unit variance, fp32: drawn, or the caller's."""
        device = self.transformer.device
        if latents is None:
            return draw_noise(shape, generators, device=device)
        return latents.to(device, torch.float32)

    def _denoise(
        self, conditioning: Conditioning, start: Start, generators: Generators, call: Call
    ) -> Tensor:
        hook: StepHook | None = None
        if call.callback_on_step_end is not None:
            names = call.callback_on_step_end_tensor_inputs
            sigma_data = self.scheduler.config.sigma_data
            hook = StepHook(call.callback_on_step_end, self, names, conditioning, sigma_data)
        with self.progress_bar(len(start.times) - 1) as bar:

            def on_step(i: int, t: float, u: Tensor) -> Tensor | None:
                bar.update()
                return None if hook is None else hook(i, t, u)

            return denoise(conditioning, start, generators, on_step=on_step, should_stop=call.should_stop)
