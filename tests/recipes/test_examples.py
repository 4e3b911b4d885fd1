"""The example of foreign teachers, with tiny random transformers of diffusers."""

import copy
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from examples import distil_any_flow_model as example
from sana_sprint.train.losses.scm import scaled_tangent
from sana_sprint.trigflow import Velocity, flow_denoiser

B, CHANNELS, SIZE, WIDTH = 2, 4, 16, 16


def text_of(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(B, 5, WIDTH, dtype=dtype), torch.randn(B, WIDTH, dtype=dtype)


def tiny_flux() -> Any:
    return FluxTransformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(2, 2, 4),
    )


def sd3(dtype: torch.dtype = torch.float64) -> tuple[Any, Velocity]:
    transformer = example.tiny_sd3().to(dtype)
    return transformer, example.sd3_velocity(transformer, *text_of(dtype))


def flux(dtype: torch.dtype = torch.float64) -> tuple[Any, Velocity]:
    transformer = tiny_flux().to(dtype)
    return transformer, example.flux_velocity(transformer, *text_of(dtype))


@pytest.mark.parametrize("make", [sd3, flux])
def test_tangent_of_a_foreign_model_equals_central_differences(make) -> None:
    """The time embedding's sinusoid is fp32 in these models, so is the difference: a large h, and a coarse bound."""
    _, velocity = make()
    denoiser = flow_denoiser(velocity)
    u, teacher_F = torch.randn(2, B, CHANNELS, SIZE, SIZE, dtype=torch.float64)
    # Angles near pi/2 and 0 alike: by the factor cos t sin t both move little.
    t = torch.tensor([0.02, 1.3], dtype=torch.float64)
    with torch.no_grad(), example.differentiable_attention():
        tangent = scaled_tangent(denoiser, u, t, teacher_F)
        h = 1e-4
        factor = torch.cos(t) * torch.sin(t)
        du = factor[:, None, None, None] * teacher_F
        ahead, behind = (denoiser(u + sign * h * du, t + sign * h * factor) for sign in (1, -1))
    difference = (ahead - behind) / (2 * h)
    scale = difference.abs().max().item()
    assert scale > 1e-2
    assert (tangent - difference).abs().max().item() < 0.02 * scale


def test_flux_tokens_keep_their_places() -> None:
    """A transformer that returns its input must give back the latent, and positions must count rows and columns."""
    seen = {}

    def identity(*, hidden_states, img_ids, **_):
        seen.update(tokens=hidden_states, ids=img_ids)
        return (hidden_states,)

    x = torch.arange(B * CHANNELS * 4 * 6, dtype=torch.float32).reshape(B, CHANNELS, 4, 6)
    text, pooled = text_of(torch.float32)
    torch.testing.assert_close(
        example.flux_velocity(identity, text, pooled)(x, torch.ones(B)), x, rtol=0, atol=0
    )
    assert seen["ids"].tolist() == [[0, i, j] for i in range(2) for j in range(3)]
    # Token 4 is row 1, column 1; each channel's four pixels follow one another.
    expected = x[0, :, 2:4, 2:4].flatten()
    torch.testing.assert_close(seen["tokens"][0, 4], expected, rtol=0, atol=0)


def test_a_copied_student_starts_at_its_teacher_and_every_weight_learns() -> None:
    teacher, velocity = sd3(torch.float32)
    text, pooled = text_of(torch.float32)
    student = copy.deepcopy(teacher)
    latents = torch.randn(B, CHANNELS, SIZE, SIZE)
    logvar = torch.zeros((), requires_grad=True)
    learning = example.sd3_velocity(student, text, pooled)
    # With r = 0 and the teacher unguided there is nothing to learn yet: g is 0, and so is the loss.
    same = example.sd3_velocity(teacher, text, pooled)
    start = example.consistency_step(learning, same, latents, logvar, tangent_weight=0.0)
    assert start.item() == 0
    loss = example.consistency_step(learning, velocity, latents, logvar, tangent_weight=1.0)
    loss.backward()
    assert loss.item() > 1e-3
    dead = [
        name for name, weight in student.named_parameters() if weight.grad is None or not weight.grad.any()
    ]
    # The last block does not use the text that it would pass on.
    assert not [name for name in dead if "add_q" not in name and "norm_added_q" not in name]


def test_it_runs(capsys) -> None:
    example.main()
    assert len(capsys.readouterr().out.splitlines()) == 10
