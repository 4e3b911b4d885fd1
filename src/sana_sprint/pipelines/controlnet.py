"""Text and a picture to follow, such as a sketch, to pictures: `SanaSprintControlNetPipeline`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sana_sprint.controls import Picture, check_kind, condition_for
from sana_sprint.images import to_pil
from sana_sprint.models.controlnet import ControlContext, SanaControlNetModel
from sana_sprint.models.transformer import CaptionContext
from sana_sprint.pipelines.base import BasePipeline
from sana_sprint.pipelines.denoise import Conditioning, Steer
from sana_sprint.pipelines.latents import encode
from sana_sprint.pipelines.output import Pictures, SanaSprintOutput
from sana_sprint.pipelines.text_to_image import SanaSprintPipeline
from sana_sprint.resolutions import Size

__all__ = ["SanaSprintControlNetPipeline"]


class SanaSprintControlNetPipeline(SanaSprintPipeline):
    """Draws pictures from text that follow another picture, in 1 to 4 (or more) network evaluations.

    A folder is that of `SanaSprintPipeline` with a subfolder `controlnet`; `from_pretrained(..., controlnet=FOLDER)` takes
    it from elsewhere, and `from_pipe(pipeline, controlnet=MODEL)` shares everything else with a pipeline that is there.

    A call has the arguments of `SanaSprintPipeline`'s, and these, by name:
        image: the picture to follow, as a PIL picture or the path of a file: one for all, one per prompt, or one per image
            (each prompt's images together). It fills the picture asked for; what stands over is cut off evenly.
        kind: what to make of it, see `controls.condition`: "scribble" for a drawing, "canny" or "softedge" for the edges
            of a picture, or with controlnet-aux "hed", "depth" and more. None: it already is what the model follows.
        thickness: of a scribble's lines, in pixels of the model; None keeps them as drawn.
        controlnet_conditioning_scale: how strictly to follow, from 0 (not at all, bit for bit) up.
        control_guidance_start, control_guidance_end: share of the steps at which following begins and ends: step i of n
            (from 0) follows if start <= i/n < end.

    The output's `conditions` are the pictures that the model saw.
    """

    component_names = (*SanaSprintPipeline.component_names, "controlnet")
    published_class_name = "SanaSprintControlNetPipeline"

    controlnet: Any

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        vae: Any,
        transformer: Any,
        scheduler: Any,
        controlnet: Any,
    ) -> None:
        BasePipeline.__init__(
            self,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            transformer=transformer,
            scheduler=scheduler,
            controlnet=controlnet,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *arguments: Any,
        image: Picture | list[Picture] | tuple[Picture, ...] | None = None,
        kind: str | None = None,
        thickness: int | None = None,
        controlnet_conditioning_scale: float = 1.0,
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 1.0,
        **named: Any,
    ) -> SanaSprintOutput | tuple[Pictures]:
        """See the class for arguments and errors."""
        if image is None:
            raise ValueError("image is missing: this pipeline follows a picture, such as a sketch")
        self.need("controlnet", "vae", "transformer")
        self.controlnet.check_transformer(self.transformer)
        steering = _Following(
            controlnet=self.controlnet,
            vae=self.vae,
            pictures=tuple(image) if isinstance(image, list | tuple) else (image,),
            kind=kind,
            thickness=thickness,
            scale=controlnet_conditioning_scale,
            start=control_guidance_start,
            end=control_guidance_end,
        )
        return super().__call__(prompt, *arguments, _steering=steering, **named)


@dataclass(frozen=True, kw_only=True)
class _Following:
    """The steering of a call that follows pictures. Raises ValueError for settings that say nothing."""

    controlnet: SanaControlNetModel
    vae: Any
    pictures: tuple[Picture, ...]
    kind: str | None
    thickness: int | None
    scale: float
    start: float
    end: float

    def __post_init__(self) -> None:
        check_kind(self.kind, self.thickness)
        if not 0 <= self.scale < float("inf"):
            raise ValueError(
                f"controlnet_conditioning_scale must be finite and at least 0, got: {self.scale}"
            )
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(
                "control_guidance_start must lie below control_guidance_end, both in [0,1]; "
                f"got: {self.start} and {self.end}"
            )

    def __call__(self, num_prompts: int, repeats: int, size: Size, times: Sequence[float]) -> Steer:
        """Makes the conditions; what is returned encodes them for the model."""
        rows = self._rows(num_prompts, repeats)
        num_steps = len(times) - 1
        steps = frozenset(i for i in range(num_steps) if self.start <= i / num_steps < self.end)
        if not steps:
            raise ValueError(
                f"none of the {num_steps} steps begins between control_guidance_start {self.start} and "
                f"control_guidance_end {self.end}: the picture would not be followed"
            )
        seen = torch.cat(
            [
                condition_for(picture, self.kind, size, thickness=self.thickness, device=self.vae.device)
                for picture in self.pictures
            ]
        )

        def steer(conditioning: Conditioning) -> Conditioning:
            latents = encode(self.vae, seen).to(conditioning.transformer.device)
            tokens = self.controlnet.encode_condition(conditioning.transformer, latents)
            return _Followed(
                **vars(conditioning),
                seen=seen,
                rows=rows,
                controlnet=self.controlnet,
                scale=self.scale,
                steps=steps,
                control=ControlContext(_captions(self.controlnet, conditioning, repeats), tokens[list(rows)]),
            )

        return steer

    def _rows(self, num_prompts: int, repeats: int) -> tuple[int, ...]:
        """For each image the number of its picture."""
        count, num_images = len(self.pictures), num_prompts * repeats
        if count == num_images:
            return tuple(range(count))
        if count == num_prompts:
            return tuple(row for row in range(count) for _ in range(repeats))
        if count == 1:
            return (0,) * num_images
        raise ValueError(
            f"image must be one picture, one per prompt ({num_prompts}) or one per image ({num_images}); got: {count}"
        )


@dataclass(kw_only=True)
class _Followed(Conditioning):
    """Conditioning that also follows pictures, in some of the steps. `step` is the number of the next one."""

    seen: Tensor  # (P,3,H,W)
    rows: tuple[int, ...]  # for each image the number of its picture
    controlnet: SanaControlNetModel
    scale: float
    steps: frozenset[int]
    control: ControlContext
    step: int = 0

    def conditions(self) -> tuple[Image.Image, ...]:
        pictures = to_pil(self.seen)  # made when all else is done: a device would be waited for
        return tuple(pictures[row] for row in self.rows)

    def replace_text(self, embeds: Tensor) -> None:
        super().replace_text(embeds)
        self.control = replace(self.control, captions=_captions(self.controlnet, self, repeats=1))

    def velocity(self, x: Tensor, flow_t: Tensor) -> Tensor:
        is_following = self.step in self.steps and self.scale > 0
        self.step += 1
        if not is_following:
            return super().velocity(x, flow_t)
        recorded = self._recorded(x, flow_t)
        if recorded is not None:
            return recorded
        return _follow(
            self.transformer,
            self.controlnet,
            self.scale,
            x,
            flow_t,
            self.guidance,
            self.context,
            self.control,
        )

    def _recorded(self, x: Tensor, flow_t: Tensor) -> Tensor | None:
        """What `_follow` makes, in one launch; None where there are no recordings."""
        transformer, controlnet, scale = self.transformer, self.controlnet, self.scale
        graphs: Any = controlnet.graphs
        if graphs is None or self.guidance is None:
            return None

        # Not a method: a recording keeps what its function refers to, and contexts are a call's own.
        def run(x: Tensor, flow_t: Tensor, guidance: Tensor, condition: Tensor, *flat: Tensor) -> Tensor:
            split = 2 * transformer.config.num_layers + 1
            context, captions = (CaptionContext.from_tensors(part) for part in (flat[:split], flat[split:]))
            control = ControlContext(captions, condition)
            return _follow(transformer, controlnet, scale, x, flow_t, guidance, context, control)

        tokens = graphs.bucket(self.context.keys[0].shape[2])
        captions = (self.context.padded(tokens), self.control.captions.padded(tokens))
        flat = [tensor for each in captions for tensor in each.tensors]
        key = (scale, transformer.blocks[0].fused, controlnet.blocks[0].fused)
        inputs = (x, flow_t, self.guidance, self.control.condition, *flat)
        velocity: Tensor | None = graphs(key, (transformer, controlnet), run, *inputs)
        return velocity


def _follow(
    transformer: Any,
    controlnet: SanaControlNetModel,
    scale: float,
    x: Tensor,
    flow_t: Tensor,
    guidance: Tensor | None,
    context: CaptionContext,
    control: ControlContext,
) -> Tensor:
    """The flow model of a transformer whose branch follows a picture."""
    own_time = flow_t * controlnet.config.time_scale
    velocity: Tensor = transformer(
        x, flow_t, context, guidance, controlnet.steer(x, own_time, control, guidance, scale)
    )
    return velocity


def _captions(controlnet: SanaControlNetModel, conditioning: Conditioning, repeats: int) -> Any:
    """The branch's keys and values, made once for each prompt, of which `conditioning.text` has `repeats` rows each."""
    text = conditioning.text
    context = controlnet.encode_control_caption(
        conditioning.transformer, text.embeds[::repeats], text.mask[::repeats]
    )
    return context.repeat(repeats)
