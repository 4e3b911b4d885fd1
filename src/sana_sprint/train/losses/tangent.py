"""dF/dt along the teacher's trajectory, what the consistency loss learns from, computed in one of three ways.

    kind          passes   what it is
    "dual"        2        value and tangent carried together by hand-written rules (`train/losses/forward_mode.py`)
    "jvp"         3.1+     `torch.func.jvp`: the reference, for any operation torch can differentiate forward
    "difference"  2        two fp32 passes either side: no rules needed, some error (`DIFFERENCE_STEP`)

"passes" is the time in plain forward passes; `benchmarks/tangent.py` measures it. Beside bf16 passes, the two fp32 ones
of "difference" count 4 to 6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from sana_sprint.backends.explicit_attention import has_fused_attention, set_fused_attention
from sana_sprint.models.controlnet import ControlContext
from sana_sprint.models.layers import autocast_off
from sana_sprint.models.transformer import CaptionContext
from sana_sprint.train.losses.forward_mode import Dual, transform
from sana_sprint.train.models.base import FlowModel, velocity_of
from sana_sprint.train.models.controlled import ControlledContext
from sana_sprint.trigflow import Denoiser, expand_like, flow_denoiser, trig_to_flow

TangentKind = Literal["dual", "jvp", "difference"]

# (transformer, context, u, t, teacher_F, guidance) -> F', as `make_tangent` describes.
Tangent = Callable[[FlowModel, CaptionContext, Tensor, Tensor, Tensor, Tensor | None], Tensor]

# In units of the direction, whose time part is at most 1/2 in training. Truncation (and the kinks of ReLU attention)
# grow with the step, fp32 rounding with its inverse. On the embedded model the error is least near here, 0.3%.
DIFFERENCE_STEP = 1e-3


def make_tangent(kind: TangentKind) -> Tangent:
    """The function of a training step: F' = cos(t) sin(t) dF/dt of the student, (B,C,H,W) fp32, without gradient.

    It takes the student's transformer, the captions' context, u (B,C,H,W), t (B,), the guided teacher's F (B,C,H,W),
    which is du/dt of the trajectory, and guidance (B,) or None as `SanaTransformer2DModel.forward` does.

    As in `losses.scaled_tangent`, the factor multiplies the direction rather than the result (the paper's JVP
    rearrangement, section 3.2): near t = pi/2, dF/dt is huge and the product is not.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind not in WAYS:
        raise ValueError(f"the tangent's kind must be one of {', '.join(WAYS)}; got {kind!r}")
    way = WAYS[kind]

    def tangent(
        transformer: FlowModel,
        context: CaptionContext,
        u: Tensor,
        t: Tensor,
        teacher_F: Tensor,
        guidance: Tensor | None,
    ) -> Tensor:
        factor = torch.cos(t) * torch.sin(t)
        du = expand_like(factor, u) * teacher_F
        return way(transformer, context, u, t, du, factor, guidance)[1].float()

    return tangent


def value_and_tangent(
    transformer: FlowModel,
    context: CaptionContext,
    u: Tensor,
    t: Tensor,
    du: Tensor,
    dt: Tensor,
    guidance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """F(u,t) of the transformer as a TrigFlow model, and its derivative along (du, dt): each (B,C,H,W), no gradient.

    Args:
        transformer: a flow model; its dropout must be inactive.
        context: the captions' keys and values; constants here, as guidance is.
        u, du: (B,C,H,W), fp32 or wider.
        t, dt: (B,), fp32 or wider.
        guidance: (B,), exactly if the transformer embeds it.

    Raises:
        ValueError: as `dual.transform`.
    """
    # `trigflow.flow_denoiser` and its derivative: c' = -c^2 (cos - sin) dt and d(flow_t)/dt = c^2.
    angle, d_angle = expand_like(t, u), expand_like(dt, u)
    cos, sin = torch.cos(angle), torch.sin(angle)
    c, slope = 1 / (cos + sin), cos - sin
    dc, d_slope = -c * c * slope * d_angle, -(cos + sin) * d_angle

    scale = transformer.config.time_scale
    flow_t = Dual(scale * trig_to_flow(t), scale * dt / (torch.cos(t) + torch.sin(t)).square())
    v, dv = transform(transformer, Dual(c * u, dc * u + c * du), flow_t, context, guidance)
    inner = slope * u + v
    return c * inner, dc * inner + c * (d_slope * u + slope * du + dv)


def value_and_tangent_by_jvp(
    transformer: FlowModel,
    context: CaptionContext,
    u: Tensor,
    t: Tensor,
    du: Tensor,
    dt: Tensor,
    guidance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `value_and_tangent`, by forward-mode automatic differentiation."""
    fused = has_fused_attention(transformer.blocks[0])
    set_fused_attention(transformer.blocks, False)  # torch has no forward-mode rule for the fused kernel
    try:
        with torch.no_grad():
            F, dF = torch.func.jvp(_denoiser(transformer, context, guidance), (u, t), (du, dt))[:2]
    finally:
        set_fused_attention(transformer.blocks, fused)
    return F, dF


def value_and_tangent_by_difference(
    transformer: FlowModel,
    context: CaptionContext,
    u: Tensor,
    t: Tensor,
    du: Tensor,
    dt: Tensor,
    guidance: Tensor | None = None,
    step: float = DIFFERENCE_STEP,
) -> tuple[Tensor, Tensor]:
    """As `value_and_tangent`, from F at (u,t) - step (du,dt) and (u,t) + step (du,dt): mean and slope.

    Central, because a one-sided difference needs two passes too (F itself comes in another precision from the pass
    with gradient) and is less exact. Both passes are fp32 even inside a caller's autocast: bf16 would leave an error
    of 2^-9 |F| / step in the tangent, more than the tangent itself.

    Raises:
        ValueError: the weights are half precision, so that fp32 passes cannot be had.
    """
    if transformer.dtype.itemsize < torch.float32.itemsize:
        raise ValueError(f"the tangent by difference needs float32 weights; they are {transformer.dtype}")
    denoiser = _denoiser(transformer, _widened(context, transformer.dtype), guidance)
    with torch.no_grad(), autocast_off(u.device):
        before = denoiser(u - step * du, t - step * dt)
        after = denoiser(u + step * du, t + step * dt)
    return (before + after) / 2, (after - before) / (2 * step)


WAYS = {
    "dual": value_and_tangent,
    "jvp": value_and_tangent_by_jvp,
    "difference": value_and_tangent_by_difference,
}


def _denoiser(transformer: FlowModel, context: CaptionContext, guidance: Tensor | None) -> Denoiser:
    return flow_denoiser(velocity_of(transformer, context, guidance))


def _widened(context: CaptionContext, dtype: torch.dtype) -> CaptionContext:
    """Keys and values that were encoded in half precision, as inputs of a wider pass."""
    captions = CaptionContext(
        tuple(key.to(dtype) for key in context.keys),
        tuple(value.to(dtype) for value in context.values),
        context.bias,
    )
    if not isinstance(context, ControlledContext):
        return captions
    control = context.control
    wide = ControlContext(_widened(control.captions, dtype), control.condition.to(dtype))
    return ControlledContext.of(captions, wide)
