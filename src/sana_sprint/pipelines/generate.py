"""The path of every pipeline: a call is checked, its text and controls are encoded, latents are sampled and decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from sana_sprint.backends.cpu.allocator import kept_while_drawing
from sana_sprint.images import resize_to_cover
from sana_sprint.models.text_encoder import PromptEmbeddings
from sana_sprint.noise import draw_noise
from sana_sprint.pipelines.base import BasePipeline
from sana_sprint.pipelines.callbacks import CALLBACK_TENSORS, EMBEDS, StepCallback, StepHook, tensor_inputs
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
from sana_sprint.pipelines.latents import decode
from sana_sprint.pipelines.output import Pictures, SanaSprintOutput, check_output_type, convert
from sana_sprint.pipelines.running import RunningCall
from sana_sprint.pipelines.start import MakeStart, Start, from_noise
from sana_sprint.pipelines.text import Prompts
from sana_sprint.precision import check_dtype, dtype_name, finite_checks_later
from sana_sprint.resolutions import Size, plan_size
from sana_sprint.sampling import schedule
from sana_sprint.stopping import Interrupt


class SprintPipeline(BasePipeline):
    """A pipeline whose calls differ in their start and their controls only; subclasses add `__call__` with its arguments."""

    _callback_tensor_inputs: ClassVar[list[str]] = list(CALLBACK_TENSORS)

    def _generate(
        self,
        call: Call,
        *,
        controls: Sequence[ControlInput] = (),
        prepare_start: Callable[[Plan], MakeStart] = lambda plan: from_noise,
    ) -> SanaSprintOutput | tuple[Pictures]:
        """The result of a call: everything is checked before anything is computed.

        Args:
            call: the arguments that all pipelines have.
            controls: ControlNets with their pictures, whose residuals are added up.
            prepare_start: checks the start's inputs for the shape of the call, and returns the function that makes the start
                from unit noise (B,C,h,w) and the times. That one runs with the models and may encode a picture.
        """
        self.need("transformer", "scheduler", *(["vae"] if call.output_type != "latent" or controls else []))
        self._check_dtypes()
        check_output_type(call.output_type)
        callback = call.callback_on_step_end
        names = tensor_inputs(callback, call.callback_on_step_end_tensor_inputs)
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
        make_start = prepare_start(plan)
        running = RunningCall(call.guidance_scale, call.attention_kwargs, plan.num_steps)
        with self._computing(shape[0] * size.model_pixels, callback), self._running(running):
            text = self._encode(prompts, call, pad=callback is not None and EMBEDS in names)
            noise = self._noise(call.latents, shape, generators)  # while a GPU encodes text
            start = make_start(noise, times)
            conditioning = Conditioning.of(transformer, text, repeats, guidance)
            conditioning.controls = tuple(control.encode(conditioning, repeats) for control in prepared)
            hook: StepHook | None = None
            if callback is not None:
                hook = StepHook(callback, self, names, conditioning, self.scheduler.config.sigma_data)
            u0 = self._denoise(conditioning, start, generators, call, running, hook)
            self._give_back("transformer", "controlnet")
            pixels = None if call.output_type == "latent" else decode(self.vae, u0, call.should_stop)
        images: Pictures | Tensor = u0
        if pixels is not None:
            images = convert(resize_to_cover(pixels, size.height, size.width), call.output_type)
        self._give_back("vae")
        output = SanaSprintOutput.of(
            images,
            size,
            seeds=seeds,
            times=(*start.times[: running.steps_done], 0.0),
            guidance=guidance,
            dtype=dtype_name(self.dtype),
            lost_tokens=text.lost_tokens,
            conditions=tuple(picture for control in prepared for picture in control.pictures()),
        )
        return output if call.return_dict else (images,)

    @contextmanager
    def _computing(self, pixels: int, callback: StepCallback | None) -> Iterator[None]:
        """Context for one call: deferred finite checks and, on a CPU, malloc settings."""
        with (
            finite_checks_later(callback is None),  # a callback must see checked tensors only
            kept_while_drawing(self.device, pixels),
        ):
            yield

    def _encode(self, prompts: Prompts, call: Call, pad: bool) -> PromptEmbeddings:
        text = prompts.encode(
            self.prompt_encoder,
            call.clean_caption,
            call.max_sequence_length,
            call.complex_human_instruction,
            pad,
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
        self,
        conditioning: Conditioning,
        start: Start,
        generators: Generators,
        call: Call,
        running: RunningCall,
        hook: StepHook | None,
    ) -> Tensor:
        """Clean latents of the steps that are made before the call ends or is interrupted."""
        with self.progress_bar(total=len(start.times) - 1) as bar:

            def on_step(i: int, t: float, u: Tensor) -> Tensor | None:
                bar.update()
                changed = None if hook is None else hook(i, t, u)
                running.steps_done = i + 1
                if running.interrupt:
                    raise Interrupt
                return changed

            return denoise(
                conditioning,
                start,
                generators,
                on_step=on_step,
                draws_after_last=call.generator is not None,
                should_stop=call.should_stop,
            )
