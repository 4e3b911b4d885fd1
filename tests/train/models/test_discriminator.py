"""LADD's discriminator: the teacher's features, the heads, and who learns from what."""

import pytest
import torch
from torch import nn

from sana_sprint.models.transformer import SanaTransformer2DModel
from sana_sprint.train.models.discriminator import VIRTUAL_BATCH, BatchNormLocal, Discriminator
from sana_sprint.trigflow import flow_denoiser
from tests.helpers.models import tiny_transformer


@pytest.fixture
def teacher() -> SanaTransformer2DModel:
    return tiny_transformer("teacher").requires_grad_(False)


def noised(teacher: SanaTransformer2DModel, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, teacher.config.in_channels, 4, 6), torch.linspace(0.2, 1.5, batch)


def captioned(teacher: SanaTransformer2DModel, batch: int):
    return teacher.encode_caption(torch.randn(batch, 5, teacher.config.caption_channels))


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_features_are_those_of_the_flow_model_inside_the_trigflow_one(scale: float) -> None:
    teacher = tiny_transformer("teacher", timestep_scale=scale / 1000)
    blocks = (1, teacher.config.num_layers - 1)
    (u, t), context = noised(teacher, 3), captioned(teacher, 3)
    discriminator = Discriminator(teacher.config.width, teacher.config.num_layers, blocks)
    seen: dict[int, torch.Tensor] = {}
    for number in blocks:
        teacher.blocks[number].register_forward_hook(
            lambda _m, _i, output, number=number: seen.__setitem__(number, output)
        )
    flow_denoiser(lambda x, s: teacher(x, s * scale, context))(u, t)
    expected = [seen[number] for number in blocks]
    features = discriminator.features(teacher, u, t, context)
    for mine, reference in zip(features, expected, strict=True):
        # The same operations but for the order of two scalings.
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


def test_blocks_after_the_last_head_do_not_run(teacher) -> None:
    discriminator = Discriminator(teacher.config.width, teacher.config.num_layers, [0])

    def fail(*_: object) -> None:
        raise AssertionError("block 1 ran")

    teacher.blocks[1].register_forward_hook(fail)
    features = discriminator.features(teacher, *noised(teacher, 2), captioned(teacher, 2))
    assert len(features) == 1


@pytest.mark.parametrize(("width", "millions"), [(2240, 50.19), (1152, 13.28)])
def test_a_head_has_the_published_size(width: int, millions: float) -> None:
    with torch.device("meta"):
        head = Discriminator(width, 20, [19])
    count = sum(parameter.numel() for parameter in head.parameters())
    assert round(count / 1e6, 2) == millions


@pytest.mark.parametrize("blocks", [[], [0, 0], [-1], [20]])
def test_impossible_blocks_are_an_error(blocks: list[int]) -> None:
    with pytest.raises(ValueError, match=r"discriminator\.blocks .* from 0 to 19"):
        Discriminator(8, 20, blocks)


def test_local_norm_is_batch_norm_of_each_group() -> None:
    x = torch.randn(2 * VIRTUAL_BATCH, 5, 7) * 3 + 1
    reference = nn.BatchNorm1d(5)
    expected = torch.cat([reference(group) for group in x.split(VIRTUAL_BATCH)])
    torch.testing.assert_close(BatchNormLocal(5)(x), expected, rtol=1e-5, atol=1e-5)  # fp32 rounding


@pytest.mark.parametrize(("batch", "sizes"), [(3, [3]), (11, [6, 5]), (17, [6, 6, 5])])
def test_local_norm_takes_any_batch(batch: int, sizes: list[int]) -> None:
    out = BatchNormLocal(5)(torch.randn(batch, 5, 7) + torch.arange(batch)[:, None, None])
    for group in out.split(sizes):
        # A mean of 35 or more normalised fp32 values.
        assert group.mean((0, 2)).abs().max() < 1e-5


def test_heads_are_spectrally_normalised_and_judge_every_token(teacher) -> None:
    discriminator = Discriminator(teacher.config.width, teacher.config.num_layers, [0, 1])
    features = discriminator.features(teacher, *noised(teacher, 4), captioned(teacher, 4))
    for _ in range(200):  # one power iteration each
        logits = discriminator(features)
    assert logits.shape == (4, 2 * 4 * 6)
    assert logits.dtype == torch.float32
    for module in discriminator.modules():
        if isinstance(module, nn.Conv1d):
            # 200 power iterations separate the largest singular values of a random matrix to well under 1%.
            assert torch.linalg.matrix_norm(module.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.01)


def test_logits_depend_on_picture_caption_and_noise(teacher) -> None:
    discriminator = Discriminator(teacher.config.width, teacher.config.num_layers, [1])
    (u, t), context = noised(teacher, 4), captioned(teacher, 4)

    def judge(u, t, context):
        return discriminator.eval()(discriminator.features(teacher, u, t, context))

    logits = judge(u, t, context)
    torch.testing.assert_close(judge(u, t, context), logits, rtol=0, atol=0)
    for other in (judge(-u, t, context), judge(u, t / 2, context), judge(u, t, captioned(teacher, 4))):
        assert not torch.allclose(other, logits, atol=1e-4)


def test_gradients_pass_through_the_frozen_teacher_to_the_picture(teacher) -> None:
    discriminator = Discriminator(teacher.config.width, teacher.config.num_layers, [0, 1])
    (u, t), context = noised(teacher, 2), captioned(teacher, 2)
    u.requires_grad_()
    discriminator(discriminator.features(teacher, u, t, context)).mean().backward()
    assert u.grad is not None
    assert u.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())
