"""Text and a picture to follow, such as a sketch, to pictures: `SanaSprintControlNetPipeline`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sana_sprint.controls import Picture
from sana_sprint.models.controlnet import SanaControlNetModel
from sana_sprint.pipelines.callbacks import StepCallback
from sana_sprint.pipelines.control import ControlInput
from sana_sprint.pipelines.inputs import Call, Generators
from sana_sprint.pipelines.output import Pictures, SanaSprintOutput
from sana_sprint.pipelines.text_to_image import SanaSprintPipeline
from sana_sprint.prompts import COMPLEX_HUMAN_INSTRUCTION, DEFAULT_MAX_SEQUENCE_LENGTH
from sana_sprint.sampling import PUBLISHED_GUIDANCE, PUBLISHED_INTERMEDIATE, PUBLISHED_MAX
from sana_sprint.stopping import ShouldStop

if TYPE_CHECKING:
    from transformers import Gemma2Model, PreTrainedTokenizerBase

    from sana_sprint.models.autoencoder import AutoencoderDC
    from sana_sprint.models.transformer import SanaTransformer2DModel
    from sana_sprint.scheduler import SCMScheduler

__all__ = ["SanaSprintControlNetPipeline"]


class SanaSprintControlNetPipeline(SanaSprintPipeline):
    """Draws pictures from text that follow another picture, in 1 to 4 (or more) network evaluations.

    A folder is that of `SanaSprintPipeline` with a subfolder `controlnet`; `from_pretrained(..., controlnet=FOLDER)` takes
    it from elsewhere, and `from_pipe(pipeline, controlnet=MODEL)` shares everything else with a pipeline that is there.

    A call has the arguments of `SanaSprintPipeline`, and these, by name:
        image: the picture to follow, as a PIL picture or the path of a file: one for all, one per prompt, or one per image
            (each prompt's images together). It is scaled to cover the requested size and cropped around its centre.
        kind: its conversion, see `controls.control_picture`: "scribble" for a drawing, "canny" or "softedge" for the edges
            of a picture, or with controlnet-aux "hed", "depth" and more. None: it is a condition already.
        thickness: of a scribble's lines, in pixels of the model; None keeps them as drawn.
        controlnet_conditioning_scale: how strictly to follow, from 0 (not at all, bit for bit) up.
        control_guidance_start, control_guidance_end: share of the steps at which following begins and ends: step i of n
            (from 0) follows if start <= i/n < end.

    The output's `conditions` are the pictures that the branch received.
    """

    component_names = (*SanaSprintPipeline.component_names, "controlnet")
    published_class_name = "SanaSprintControlNetPipeline"

    controlnet: SanaControlNetModel

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        text_encoder: Gemma2Model | None,
        vae: AutoencoderDC | None,
        transformer: SanaTransformer2DModel | None,
        scheduler: SCMScheduler | None,
        controlnet: SanaControlNetModel | None,
    ) -> None:
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)
        self.controlnet = controlnet  # type: ignore[assignment]  # may be None, as any component

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
        image: Picture | list[Picture] | tuple[Picture, ...] | None = None,
        kind: str | None = None,
        thickness: int | None = None,
        controlnet_conditioning_scale: float = 1.0,
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 1.0,
        seed: int | Sequence[int] | None = None,
        should_stop: ShouldStop | None = None,
    ) -> SanaSprintOutput | tuple[Pictures]:
        """See the class for arguments and errors."""
        if image is None:
            raise ValueError("image is missing: this pipeline follows a picture, such as a sketch")
        self.need("controlnet", "vae", "transformer")
        self.controlnet.check_transformer(self.transformer)
        control = ControlInput(
            controlnet=self.controlnet,
            vae=self.vae,
            pictures=tuple(image) if isinstance(image, list | tuple) else (image,),
            kind=kind,
            thickness=thickness,
            scale=controlnet_conditioning_scale,
            start=control_guidance_start,
            end=control_guidance_end,
        )
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
            ),
            controls=(control,),
        )
