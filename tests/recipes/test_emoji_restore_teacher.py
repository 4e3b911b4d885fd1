"""A student without its guidance embedding computes what it computed at that scale, and is a teacher that a run can start from."""

from __future__ import annotations

import pytest
import torch

from recipes.emoji.export import EMBEDDED
from recipes.emoji.restore_teacher import without_guidance
from sana_sprint.models.transformer import SanaTransformer2DModel
from sana_sprint.train.models.student import with_guidance
from sana_sprint.weights import load_model


@torch.no_grad()
@pytest.mark.parametrize("scale", [2.0, 4.5])
def test_what_is_left_computes_the_same(scale: float) -> None:
    torch.manual_seed(0)
    student = load_model(SanaTransformer2DModel, EMBEDDED / "transformer", dtype=torch.float32)
    teacher = without_guidance(student, scale)
    latent, flow_t = torch.randn(2, 16, 8, 8), torch.tensor([0.3, 0.9])
    text = torch.randn(2, 7, 256)
    expected = student(latent, flow_t, student.encode_caption(text), torch.full((2,), scale))
    found = teacher(latent, flow_t, teacher.encode_caption(text))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # fp32 sums in another order
    assert not teacher.config.guidance_embeds
    with_guidance(teacher)  # it can be distilled again
