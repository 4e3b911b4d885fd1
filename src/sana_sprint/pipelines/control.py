"""The pictures that a ControlNet follows in a call: checked, made into conditions, encoded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from sana_sprint.controls import Picture, check_kind, control_picture_for
from sana_sprint.images import to_pil
from sana_sprint.models.autoencoder import AutoencoderDC
from sana_sprint.models.controlnet import ControlContext, SanaControlNetModel
from sana_sprint.pipelines.denoise import Conditioning, Control
from sana_sprint.pipelines.inputs import Plan
from sana_sprint.pipelines.latents import encode


@dataclass(frozen=True, kw_only=True)
class ControlInput:
    """The pictures of one ControlNet in a call, and its settings. Raises ValueError for settings without meaning."""

    controlnet: SanaControlNetModel
    vae: AutoencoderDC
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

    def prepare(self, plan: Plan) -> PreparedControl:
        """Makes the conditions. Raises ValueError for pictures that do not fit the call, and if no step would use them."""
        rows = self._rows(plan)
        steps = frozenset(i for i in range(plan.num_steps) if self.start <= i / plan.num_steps < self.end)
        if not steps:
            raise ValueError(
                f"none of the {plan.num_steps} steps begins between control_guidance_start {self.start} and "
                f"control_guidance_end {self.end}: the picture would not be followed"
            )
        conditions = torch.cat(
            [
                control_picture_for(
                    picture, self.kind, plan.size, thickness=self.thickness, device=self.vae.device
                )
                for picture in self.pictures
            ]
        )
        return PreparedControl(self, conditions, rows, steps)

    def _rows(self, plan: Plan) -> tuple[int, ...]:
        """For each image the number of its picture."""
        count, num_prompts, num_images = len(self.pictures), plan.num_prompts, plan.num_images
        if count == num_images:
            return tuple(range(count))
        if count == num_prompts:
            return tuple(row for row in range(count) for _ in range(plan.repeats))
        if count == 1:
            return (0,) * num_images
        raise ValueError(
            f"image must be one picture, one per prompt ({num_prompts}) or one per image ({num_images}); got: {count}"
        )


@dataclass(frozen=True)
class PreparedControl:
    """A call's conditions (P,3,H,W) of one ControlNet, the condition of each image, and the steps that use them."""

    control: ControlInput
    conditions: Tensor
    rows: tuple[int, ...]
    steps: frozenset[int]

    def encode(self, conditioning: Conditioning, repeats: int) -> Control:
        """The branch's inputs: tokens of the conditions, keys and values of the captions."""
        controlnet = self.control.controlnet
        latents = encode(self.control.vae, self.conditions).to(conditioning.transformer.device)
        tokens = controlnet.encode_condition(conditioning.transformer, latents)
        captions = conditioning.control_captions(controlnet, repeats)
        return Control(
            controlnet=controlnet,
            context=ControlContext(captions, tokens[list(self.rows)]),
            scale=self.control.scale,
            steps=self.steps,
        )

    def pictures(self) -> tuple[Image.Image, ...]:
        """The conditions as pictures, one per image. Waits for the device."""
        pictures = to_pil(self.conditions)
        return tuple(pictures[row] for row in self.rows)
