"""The transformer with its control branches as one function, and as one CUDA graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from sana_sprint.models.controlnet import ControlContext, SanaControlNetModel
from sana_sprint.models.transformer import CaptionContext, Control, SanaTransformer2DModel


class Branch(NamedTuple):
    """A ControlNet, its encoded picture and captions, and the factor of its residuals."""

    controlnet: SanaControlNetModel
    context: ControlContext
    scale: float


def controlled_velocity(
    transformer: SanaTransformer2DModel,
    branches: Sequence[Branch],
    x: Tensor,
    flow_t: Tensor,
    guidance: Tensor | None,
    context: CaptionContext,
) -> Tensor:
    """The flow velocity of a transformer between whose blocks the sum of the branches' residuals is added."""
    controls = [
        controlnet.steer(x, flow_t * controlnet.config.time_scale, condition, guidance, scale)
        for controlnet, condition, scale in branches
    ]
    velocity: Tensor = transformer(x, flow_t, context, guidance, _sum(controls))
    return velocity


def recorded_velocity(
    transformer: SanaTransformer2DModel,
    branches: Sequence[Branch],
    x: Tensor,
    flow_t: Tensor,
    guidance: Tensor | None,
    context: CaptionContext,
) -> Tensor | None:
    """`controlled_velocity` in one launch; None where there are no recordings."""
    graphs: Any = branches[0].controlnet.graphs
    if graphs is None or guidance is None:
        return None
    size = 2 * transformer.config.num_layers + 1  # tensors of the transformer's captions
    own = [2 * branch.controlnet.config.num_layers + 1 for branch in branches]
    parts = [(branch.controlnet, branch.scale) for branch in branches]

    # A recording keeps what its function refers to, so it must not refer to a call's contexts.
    def run(x: Tensor, flow_t: Tensor, guidance: Tensor, *flat: Tensor) -> Tensor:
        captions, rest = CaptionContext.from_tensors(flat[:size]), flat[size:]
        rebuilt = []
        for (controlnet, scale), count in zip(parts, own, strict=True):
            condition, tensors, rest = rest[0], rest[1 : 1 + count], rest[1 + count :]
            rebuilt.append(
                Branch(controlnet, ControlContext(CaptionContext.from_tensors(tensors), condition), scale)
            )
        return controlled_velocity(transformer, rebuilt, x, flow_t, guidance, captions)

    tokens = graphs.bucket(context.keys[0].shape[2])
    flat = [*context.padded(tokens).tensors]
    for branch in branches:
        flat += [branch.context.condition, *branch.context.captions.padded(tokens).tensors]
    models = (transformer, *(branch.controlnet for branch in branches))
    key = (*(branch.scale for branch in branches), *(model.blocks[0].fused for model in models))
    velocity: Tensor | None = graphs(key, models, run, x, flow_t, guidance, *flat)
    return velocity


def _sum(controls: Sequence[Control]) -> Control:
    """One control that adds the residuals of all."""
    if len(controls) == 1:
        return controls[0]

    def control(tokens: Tensor, modulation: Tensor) -> Mapping[int, Tensor]:
        total: dict[int, Tensor] = {}
        for each in controls:
            for number, residual in each(tokens, modulation).items():
                total[number] = total[number] + residual if number in total else residual
        return total

    return control
