"""The consistency loss: its tangent against finite differences, and all of it against the paper's equations in fp64."""

import math

import torch
from _models import TRANSFORMERS

from sana_sprint.models.transformer import SanaTransformer2DModel, TransformerConfig
from sana_sprint.train import losses
from sana_sprint.trigflow import Denoiser, flow_denoiser

SIGMA_D = 0.5
B, SHAPE = 3, (4, 5, 3)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    u = torch.randn(B, *SHAPE, dtype=torch.float64)
    return u, torch.tensor([0.2, 0.9, 1.5], dtype=torch.float64), torch.randn_like(u)


def smooth_student(u: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.tanh(0.3 * u) * torch.cos(t)[:, None, None, None] + torch.sin(2 * t)[:, None, None, None]


def central_difference(
    student: Denoiser, u: torch.Tensor, t: torch.Tensor, teacher_F: torch.Tensor
) -> torch.Tensor:
    h = 1e-6
    factor = torch.cos(t) * torch.sin(t)
    du = factor[:, None, None, None] * teacher_F
    return (student(u + h * du, t + h * factor) - student(u - h * du, t - h * factor)) / (2 * h)


def test_tangent_equals_central_differences_for_a_whole_transformer() -> None:
    model = SanaTransformer2DModel(TransformerConfig(**TRANSFORMERS["sprint"])).double()
    model.set_fused_attention(False)
    channels = model.config.in_channels
    context = model.encode_caption(torch.randn(B, 5, model.config.caption_channels, dtype=torch.float64))
    guidance = torch.tensor([4.0, 4.5, 5.0], dtype=torch.float64)
    student = flow_denoiser(lambda x, s: model(x, s, context, guidance))
    u, teacher_F = torch.randn(2, B, channels, 4, 6, dtype=torch.float64)
    _, t, _ = batch()
    tangent = losses.scaled_tangent(student, u, t, teacher_F)
    reference = central_difference(student, u, t, teacher_F)
    # `scaled_tangent` returns fp32, whose rounding of values near 1 this allows ten times over.
    assert (tangent - reference).abs().max() < 1e-6 * max(1.0, reference.abs().max().item())
    assert reference.abs().max() > 1e-3  # a model whose output ignored its input would prove nothing


def paper_loss(
    student: Denoiser,
    u: torch.Tensor,
    t: torch.Tensor,
    teacher_F: torch.Tensor,
    r: float,
    logvar: torch.Tensor,
) -> torch.Tensor:
    """Algorithm 2 as printed, in data space: x_t, sigma_d and dx/dt, with c = 0.1 and the code's prior weight."""
    cos, sin = torch.cos(t)[:, None, None, None], torch.sin(t)[:, None, None, None]
    x_t = SIGMA_D * u
    dx_dt = SIGMA_D * teacher_F
    F = student(x_t / SIGMA_D, t)
    F_minus = F.detach()
    F_prime = central_difference(student, u, t, teacher_F).detach()
    g = -(cos**2) * (SIGMA_D * F_minus - dx_dt) - r * (cos * sin * x_t + SIGMA_D * F_prime)
    g = g / (g.flatten(1).norm(dim=1)[:, None, None, None] + 0.1)
    weight = 1 / (SIGMA_D * torch.tan(t))
    squared = ((F - F_minus - g) ** 2).flatten(1).mean(1)
    return (weight / torch.exp(logvar) * squared + logvar).mean()


def test_loss_and_gradient_equal_the_papers_equations() -> None:
    u, t, teacher_F = batch()
    logvar = torch.tensor([-1.0, 0.5, 0.0], dtype=torch.float64)
    for r in (0.0, 0.3, 1.0):
        scale = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)

        def student(u: torch.Tensor, t: torch.Tensor, scale: torch.Tensor = scale) -> torch.Tensor:
            return scale * smooth_student(u, t)

        F = student(u, t)
        tangent = losses.scaled_tangent(student, u, t, teacher_F)
        g = losses.consistency_target(F.detach(), teacher_F, tangent, u, t, tangent_weight=r)
        ours, _ = losses.scm_loss(F, g, t, logvar)
        (gradient,) = torch.autograd.grad(ours, scale)
        reference = paper_loss(student, u, t, teacher_F, r, logvar)
        (reference_gradient,) = torch.autograd.grad(reference, scale)
        # The tangent passes through fp32, relative rounding 6e-8; the rest is fp64.
        assert math.isclose(ours.item(), reference.item(), rel_tol=1e-6)
        assert math.isclose(gradient.item(), reference_gradient.item(), rel_tol=1e-5)


def test_the_exact_consistency_model_of_gaussian_data_has_zero_target() -> None:
    """For unit Gaussian data the teacher's F is 0, paths stand still, and f(u,t) = u, so F = -tan(t/2) u is exact."""
    u, t, _ = batch()

    def student(u: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return -torch.tan(t / 2)[:, None, None, None] * u

    teacher_F = torch.zeros_like(u)
    tangent = losses.scaled_tangent(student, u, t, teacher_F)
    g = losses.consistency_target(student(u, t), teacher_F, tangent, u, t, tangent_weight=1.0)
    assert g.abs().max() < 1e-6  # fp32 rounding of the tangent
    half = losses.consistency_target(student(u, t), teacher_F, tangent, u, t, tangent_weight=0.5)
    assert half.abs().max() > 1e-2  # and it is the whole tangent that cancels
