"""Distils a flow-matching transformer of another family: SD3 or FLUX from diffusers, or any callable.

All that the library asks of a model is a function velocity(x, s) that predicts noise - data: x (B,C,H,W) is
(1-s) data + s noise, s (B,) lies in [0,1]. `flow_denoiser` makes it a TrigFlow model without loss; the consistency
loss is then three calls. Run this file to see it work on a tiny SD3 with random weights (needs diffusers).

Two things to know before doing it in earnest:

* These models embed 1000 s, so that dF/dt is a thousand times that of SANA-Sprint's, and training diverges (section 3.2
  of the paper). Divide by `TIME_SCALE` instead of multiplying, and fine-tune the teacher to that for a few thousand
  steps of ordinary flow matching first; RMS norms on queries and keys (SD3.5 and FLUX have them) belong to the same step.
* Fused attention has no forward-mode derivative: the tangent is computed inside `differentiable_attention()`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sana_sprint.train.losses.flow import guided
from sana_sprint.train.losses.scm import consistency_target, scaled_tangent, scm_loss
from sana_sprint.trigflow import Velocity, add_noise, flow_denoiser, lognormal_times

TIME_SCALE = 1000.0  # SD3's transformer takes 1000 s; FLUX's takes s and multiplies inside


def sd3_velocity(transformer: Any, text: Tensor, pooled: Tensor) -> Velocity:
    """An SD3Transformer2DModel with its text: embeddings (B,L,D) and pooled embeddings (B,P)."""

    def velocity(x: Tensor, s: Tensor) -> Tensor:
        return transformer(
            hidden_states=x,
            timestep=TIME_SCALE * s,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            return_dict=False,
        )[0]

    return velocity


def flux_velocity(transformer: Any, text: Tensor, pooled: Tensor, guidance: Tensor | None = None) -> Velocity:
    """A FluxTransformer2DModel with its text (B,L,D), pooled text (B,P), and guidance (B,) if it is a model with that input.

    FLUX sees 2x2 pixels of the latent as one token, with its row and column beside it.
    """

    def velocity(x: Tensor, s: Tensor) -> Tensor:
        tokens = nn.functional.pixel_unshuffle(x, 2)  # (B,4C,H/2,W/2)
        rows, columns = tokens.shape[2:]
        positions = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns))
        predicted = transformer(
            hidden_states=tokens.flatten(2).transpose(1, 2),
            timestep=s,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            img_ids=positions.to(x),
            txt_ids=x.new_zeros(text.shape[1], 3),
            guidance=guidance,
            return_dict=False,
        )[0]
        return nn.functional.pixel_shuffle(predicted.transpose(1, 2).unflatten(2, (rows, columns)), 2)

    return velocity


def differentiable_attention() -> Any:
    """A context in which attention is made of operations that forward-mode differentiation knows."""
    return sdpa_kernel(SDPBackend.MATH)


def consistency_step(
    student: Velocity, teacher: Velocity, latents: Tensor, logvar: Tensor, *, tangent_weight: float
) -> Tensor:
    """The sCM loss on clean latents (B,C,H,W) of variance 1; call `backward` on it.

    Args:
        student: learns.
        teacher: stays, with guidance inside.
        latents: the batch.
        logvar: the loss's log variance, learnt: one number for all samples, or one for each (B,).
        tangent_weight: grows from 0 to 1 over the first thousands of steps.
    """
    t = lognormal_times(len(latents), mean=0.2, std=1.6, device=latents.device).to(latents.dtype)
    u = add_noise(latents, torch.randn_like(latents), t)
    with torch.no_grad():
        teacher_F = flow_denoiser(teacher)(u, t)
    denoiser = flow_denoiser(student)
    with differentiable_attention():
        tangent = scaled_tangent(denoiser, u, t, teacher_F)
    F = denoiser(u, t)
    g = consistency_target(F.detach(), teacher_F, tangent, u, t, tangent_weight=tangent_weight)
    loss, _ = scm_loss(F, g, t, logvar)
    return loss


def tiny_sd3() -> Any:
    """A random SD3 of 16x16 latents that takes no time at all."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        qk_norm="rms_norm",
    )


def main() -> None:
    """Ten updates of a copy of the teacher."""
    torch.manual_seed(0)
    teacher = tiny_sd3().requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)
    logvar = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.AdamW([*student.parameters(), logvar], lr=1e-4)
    text, pooled = torch.randn(8, 5, 16), torch.randn(8, 16)
    guided_teacher = guided(
        sd3_velocity(teacher, text, pooled),
        sd3_velocity(teacher, torch.zeros_like(text), torch.zeros_like(pooled)),
        4.5,
    )
    for step in range(10):
        latents = torch.randn(8, 4, 16, 16)
        learning = sd3_velocity(student, text, pooled)
        loss = consistency_step(learning, guided_teacher, latents, logvar, tangent_weight=step / 10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
