"""The condition of a call's denoiser, and the loop from a start to clean latents."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sana_sprint.models.controlnet import ControlContext, ControlStep, ControlSum, SanaControlNetModel
from sana_sprint.models.text_encoder import PromptEmbeddings
from sana_sprint.models.transformer import CaptionContext, SanaTransformer2DModel
from sana_sprint.noise import draw_noise
from sana_sprint.pipelines.inputs import Generators
from sana_sprint.pipelines.start import Start
from sana_sprint.precision import check_finite, send
from sana_sprint.sampling import OnStep, Sampler, consistency
from sana_sprint.stopping import ShouldStop
from sana_sprint.trigflow import flow_denoiser


@dataclass(frozen=True, kw_only=True)
class Control:
    """A ControlNet branch with its encoded picture, in effect in some of the steps."""

    controlnet: SanaControlNetModel
    context: ControlContext  # one row per image
    scale: float
    steps: frozenset[int]

    def has_effect(self, step: int) -> bool:
        """Whether residuals are added in this step."""
        return step in self.steps and self.scale > 0

    def residuals(self, x: Tensor, flow_t: Tensor, guidance: Tensor | None) -> ControlStep:
        """The branch's residuals for x (B,C,h,w) at flow time (B,)."""
        own_time = flow_t * self.controlnet.config.time_scale
        return self.controlnet.steer(x, own_time, self.context, guidance, self.scale)


@dataclass
class Conditioning:
    """Captions, guidance and controls of one call. Captions are projected once for all steps."""

    transformer: SanaTransformer2DModel
    text: PromptEmbeddings  # one row per image
    context: CaptionContext
    guidance: Tensor | None  # (B,) fp32
    controls: tuple[Control, ...] = ()

    @classmethod
    def of(
        cls,
        transformer: SanaTransformer2DModel,
        text: PromptEmbeddings,
        repeats: int,
        guidance: tuple[float, ...] | None,
    ) -> Conditioning:
        """From one row of text per prompt, with `repeats` images each, and one guidance scale per image."""
        device = transformer.device
        text = text.to(device)
        used = text.trimmed()
        context = transformer.encode_caption(used.embeds, used.mask)
        return cls(
            transformer=transformer,
            text=text.repeat(repeats),
            context=context if repeats == 1 else context.repeat(repeats),
            guidance=None if guidance is None else send(torch.tensor(guidance, dtype=torch.float32), device),
        )

    def replace_text(self, embeds: Tensor) -> None:
        """Continues with other embeddings (B,L,D) under the same mask."""
        self.text = replace(self.text, embeds=embeds.to(self.transformer.device))
        used = self.text.trimmed()
        self.context = self.transformer.encode_caption(used.embeds, used.mask)
        self.controls = tuple(
            replace(
                control,
                context=replace(
                    control.context, captions=self.control_captions(control.controlnet, repeats=1)
                ),
            )
            for control in self.controls
        )

    def control_captions(self, controlnet: SanaControlNetModel, repeats: int) -> CaptionContext:
        """The captions' keys and values in a branch, made once for each prompt, which has `repeats` rows of text."""
        text = self.text.trimmed()
        context = controlnet.encode_control_caption(
            self.transformer, text.embeds[::repeats], text.mask[::repeats]
        )
        return context.repeat(repeats)

    def velocity(self, x: Tensor, flow_t: Tensor, step: int) -> Tensor:
        """The flow velocity (B,C,h,w) of x (B,C,h,w) at flow time (B,), fp32 in and out."""
        steps = tuple(
            control.residuals(x, flow_t, self.guidance)
            for control in self.controls
            if control.has_effect(step)
        )
        control = (ControlSum(steps),) if steps else ()
        v: Tensor = self.transformer(x, flow_t, self.context, self.guidance, *control)
        return v

    def denoise(self, u: Tensor, t: Tensor, step: int) -> Tensor:
        """F (B,C,h,w) in TrigFlow units for u at angle t (B,): a `sampling.StepDenoiser`."""
        return flow_denoiser(lambda x, flow_t: self.velocity(x, flow_t, step))(u, t)


def denoise(
    conditioning: Conditioning,
    start: Start,
    generators: Generators,
    *,
    on_step: OnStep,
    draws_after_last: bool = False,
    should_stop: ShouldStop | None = None,
    sampler: Sampler = consistency,
) -> Tensor:
    """Clean latents (B,C,h,w) of unit variance, in fp32 whatever the weights are: the clean estimate of the last step.

    With `draws_after_last` the generators also draw after the last step, for nothing, as the published scheduler does: the
    caller's next call then gets the noise that it would get there.

    Raises:
        NonFiniteError: naming the step.
        Stopped: if `should_stop` returned True before a network evaluation.
    """
    num_steps = len(start.times) - 1
    u = check_finite(start.u, "latents")

    def draw() -> Tensor:
        return draw_noise(u.shape, generators, device=u.device)

    def check_step(i: int, t: float, u: Tensor) -> Tensor | None:
        if draws_after_last and i == num_steps - 1:
            draw()
        return on_step(i, t, check_finite(u, f"step {i + 1} of {num_steps}"))

    return sampler(
        conditioning.denoise,
        u,
        start.times,
        draw_noise=draw,
        constrain=start.constrain,
        on_step=check_step,
        should_stop=should_stop,
    )
