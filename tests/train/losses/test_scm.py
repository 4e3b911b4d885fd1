"""The consistency loss: its tangent against finite differences, and the data whose exact answer is known."""

import torch

from sana_sprint.backends.explicit_attention import set_fused_attention
from sana_sprint.models.transformer import SanaTransformer2DModel, TransformerConfig
from sana_sprint.train.losses import scm as losses
from sana_sprint.trigflow import Denoiser, flow_denoiser
from tests.helpers.models import TRANSFORMERS

B, SHAPE = 3, (4, 5, 3)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    u = torch.randn(B, *SHAPE, dtype=torch.float64)
    return u, torch.tensor([0.2, 0.9, 1.5], dtype=torch.float64), torch.randn_like(u)


def central_difference(
    student: Denoiser, u: torch.Tensor, t: torch.Tensor, teacher_F: torch.Tensor
) -> torch.Tensor:
    h = 1e-6
    factor = torch.cos(t) * torch.sin(t)
    du = factor[:, None, None, None] * teacher_F
    return (student(u + h * du, t + h * factor) - student(u - h * du, t - h * factor)) / (2 * h)


def test_tangent_equals_central_differences_for_a_whole_transformer() -> None:
    model = SanaTransformer2DModel(TransformerConfig(**TRANSFORMERS["sprint"])).double()
    set_fused_attention(model.blocks, False)
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
