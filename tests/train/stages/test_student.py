"""The hybrid distillation stage: who learns when, from which losses, and what must not move."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from sana_sprint.models.autoencoder import AutoencoderDC
from sana_sprint.models.layers import sinusoid
from sana_sprint.models.transformer import SanaTransformer2DModel
from sana_sprint.train import loop
from sana_sprint.train.config import RunConfig, StudentRun
from sana_sprint.train.losses import Adversarial
from sana_sprint.train.models.student import Student, with_guidance
from sana_sprint.train.stages.autoencoder import AutoencoderStage
from sana_sprint.train.stages.base import Part
from sana_sprint.train.stages.student import StudentStage
from sana_sprint.train.stages.teacher import TeacherStage
from sana_sprint.train.trainer import Trainer
from sana_sprint.trigflow import T_MAX, prior_weight
from sana_sprint.weights import load_model, save_model
from tests.helpers.models import tiny_transformer
from tests.helpers.training import autoencoder_run, hybrid_run, loss_of, student_run, teacher_run


def parse(values: dict[str, Any]) -> Any:
    return TypeAdapter(RunConfig).validate_python(values)


def silent(_: str) -> None:
    """A report nobody reads."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of a few steps."""
    folder = tmp_path_factory.mktemp("hybrid")
    run = parse(autoencoder_run(folder / "autoencoder", steps=1))
    loop.run(AutoencoderStage(run, report=silent), run, report=silent)
    run = parse(teacher_run(folder / "teacher", folder / "autoencoder" / "final", steps=2))
    loop.run(TeacherStage(run, report=silent), run, report=silent)
    return folder / "teacher" / "final"


@pytest.fixture
def make_stage(teacher: Path, tmp_path: Path) -> Callable[..., StudentStage]:
    def make(values: Callable[..., dict[str, Any]] = hybrid_run, /, **changes: Any) -> StudentStage:
        own = {name: changes.pop(name) for name in list(changes) if name in StudentRun.model_fields}
        run = parse({**values(tmp_path / "run", teacher, **changes), **own})
        return StudentStage(run, report=silent)

    return make


def copies(module: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def moved(module: nn.Module, before: list[torch.Tensor]) -> bool:
    return any(not torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))


def test_players_take_turns_and_only_the_one_whose_turn_it_is_moves(make_stage) -> None:
    stage = make_stage()
    trainer = Trainer(stage, stage.config)
    student, heads = stage.players["student"], stage.players["discriminator"]
    teacher_before = copies(stage.models.teacher)
    for step, expected in enumerate(["student", "discriminator", "student", "discriminator"]):
        before = {"student": copies(student), "discriminator": copies(heads)}
        assert stage.player(step) == expected
        trainer.step(step)
        changed = {name for name, module in stage.players.items() if moved(module, before[name])}
        assert changed == {expected}
    assert not moved(stage.models.teacher, teacher_before)


def test_the_hybrid_loss_is_the_weighted_sum_of_its_parts(make_stage) -> None:
    part = Part(step=0, indices=range(4))

    def loss(**changes: Any) -> float:
        stage = make_stage(**changes)
        torch.manual_seed(7)
        return stage.loss(part)[0].item()

    small, large, alone = loss(weight=0.25), loss(weight=1.0), loss(weight=1.0, scm_weight=0.0)
    # Linear in either weight, so what is left at weight 0 is the consistency loss, whatever its weight; fp32 sums.
    consistency = (4 * small - large) / 3
    assert large == pytest.approx(consistency + alone, abs=1e-4)
    assert loss(weight=1.0, scm_weight=2.0) == pytest.approx(2 * consistency + alone, abs=1e-4)
    assert abs(alone) > 1e-3


def test_the_adversarial_loss_alone_trains_too(make_stage) -> None:
    stage = make_stage(scm_weight=0.0)
    before = copies(stage.student)
    metrics = Trainer(stage, stage.config).step(0)
    assert moved(stage.student, before)
    assert "direction_norm" not in metrics
    assert "adversarial_loss" in metrics


def test_no_loss_at_all_is_an_error(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to learn from"):
        parse({**student_run(tmp_path, teacher), "scm_weight": 0.0})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputing_changes_no_gradient_and_keeps_less(make_stage, precision: str) -> None:
    found: dict[bool, tuple[list[torch.Tensor], int]] = {}
    for recompute in (True, False):
        stage = make_stage(recompute_pictures=recompute, precision=precision)
        kept: list[int] = []
        torch.manual_seed(7)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, kept=kept: (kept.append(x.nbytes), x)[1], lambda x: x
        ):
            loss, _ = stage.loss(Part(step=400, indices=range(1600, 1604)))
        gradients = torch.autograd.grad(loss, list(stage.student.parameters()), allow_unused=True)
        found[recompute] = ([loss, *(g for g in gradients if g is not None)], sum(kept))
    assert all(torch.equal(a, b) for a, b in zip(found[True][0], found[False][0], strict=True))
    # Of the two student passes' activations one is left; caption, time and output layers are not recomputed.
    assert found[True][1] < 0.8 * found[False][1]


@pytest.mark.parametrize(("rate", "expected"), [(0.0, 0.0), (1.0, 1.0)])
def test_max_time_weighting_starts_from_pure_noise(make_stage, rate: float, expected: float) -> None:
    stage = make_stage(max_time_rate=rate)
    times: list[torch.Tensor] = []

    def student(u: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        times.append(t)
        return torch.zeros_like(u)

    u0 = torch.randn(64, 4, 4, 4)
    stage.distillation.pictures(student, u0)
    assert [(t == torch.tensor(T_MAX)).float().mean().item() for t in times] == [expected]


def test_the_student_gets_the_whole_gradient_of_the_discriminators_verdict(make_stage) -> None:
    stage = make_stage()
    adversary = loss_of(stage, Adversarial)
    u0, weight = torch.randn(4, 4, 4, 4), torch.tensor(0.3, requires_grad=True)
    context = adversary.teacher.encode_caption(torch.randn(4, 3, 16))

    def student(u: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return weight * u

    def plain(fake: torch.Tensor) -> torch.Tensor:
        t = adversary.draw_times(len(fake))
        return -adversary.discriminator(adversary.features(fake, t, context)).mean()

    found = []
    state = copy.deepcopy(adversary.discriminator.state_dict())  # a pass moves the spectral norms' vectors
    for compute in (plain, lambda fake: adversary.student_loss(fake, context)):
        adversary.discriminator.load_state_dict(state)
        torch.manual_seed(2)
        loss = compute(stage.distillation.pictures(student, u0))
        found.append((loss.item(), torch.autograd.grad(loss, weight)[0].item()))
    assert found[1] == pytest.approx(found[0], rel=1e-5)  # the same sums
    assert found[0][1] != 0


def test_misaligned_pairs_are_real_pictures_with_the_neighbours_caption(make_stage, monkeypatch) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    adversary = loss_of(make_stage(), Adversarial)
    original = adversary.features

    def record(u0, t, context):
        seen.append((u0, t, context.keys[0]))
        return original(u0, t, context)

    monkeypatch.setattr(adversary, "features", record)
    u0 = torch.randn(3, 4, 4, 4)  # not a multiple of anything
    context = adversary.teacher.encode_caption(torch.randn(3, 3, 16))
    adversary.discriminator_loss(torch.randn_like(u0), u0, context)
    (real, real_t, _), (fake, fake_t, keys) = seen
    torch.testing.assert_close(real, u0, rtol=0, atol=0)
    torch.testing.assert_close(fake[3:], u0[[2, 0, 1]], rtol=0, atol=0)
    torch.testing.assert_close(keys, context.keys[0][[0, 1, 2, 0, 1, 2]], rtol=0, atol=0)
    # Student pictures are noised as much as the real ones; the misaligned pairs draw their own times.
    torch.testing.assert_close(fake_t[:3], real_t, rtol=0, atol=0)
    assert not torch.equal(fake_t[3:], real_t)


def test_the_gradient_penalty_is_added_and_reported(make_stage) -> None:
    part = Part(step=1, indices=range(4))
    losses = {}
    for weight in (0.0, 2.0):
        stage = make_stage(r1_weight=weight)
        torch.manual_seed(3)
        loss, metrics = stage.loss(part)
        losses[weight] = (loss.item(), metrics)
    assert "r1" not in losses[0.0][1]
    penalty = losses[2.0][1]["r1"]
    assert penalty > 0
    assert losses[2.0][0] == pytest.approx(losses[0.0][0] + penalty, rel=1e-4)  # weight / 2 = 1; fp32 sums


def test_guidance_scales_are_told_apart_from_the_start() -> None:
    student = with_guidance(tiny_transformer("teacher", timestep_scale=0.001))
    embedder = student.get_submodule("time_embed.guidance_embedder")

    def features(scale: float) -> torch.Tensor:
        number = torch.tensor([scale * student.config.guidance_embeds_scale])
        return nn.functional.silu(embedder.linear_1(sinusoid(number)))

    difference = (features(4.0) - features(5.0)).norm() / features(4.5).norm()
    assert difference > 0.2  # a random first layer of standard deviation 0.02 gives 0.02
    assert not embedder.linear_2.weight.any()
    assert not embedder.linear_2.bias.any()


@pytest.mark.parametrize("instruction_rate", [0.0, 1.0])
def test_cached_embeddings_change_nothing(make_stage, instruction_rate: float) -> None:
    losses = []
    for cached in (False, True):
        stage = make_stage(student_run, cache_text=cached, instruction_rate=instruction_rate)
        torch.manual_seed(5)
        losses.append(stage.loss(Part(step=0, indices=range(4)))[0].item())
    # The encoder sees other batches, so fp32 sums in another order.
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_all_times_weigh_the_same_at_the_start() -> None:
    """The weight of the squared error is w(t) e^-logvar; the loss, without it, starts where a settled one would be."""
    student = Student(with_guidance(tiny_transformer("teacher", timestep_scale=0.001)), latent_size=96)
    t = torch.tensor([0.01, 0.5, 1.2, 1.5, 1.57])
    weight = prior_weight(t) * torch.exp(-student.log_variance(t, torch.full((5,), 4.5)))
    torch.testing.assert_close(weight, torch.full((5,), 96.0), rtol=1e-4, atol=0)  # fp32 exp of up to 7


def test_a_teacher_whose_time_is_not_dense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"multiplied by 1000 .* adaptation stage"):
        with_guidance(tiny_transformer("teacher", timestep_scale=1.0))


def test_a_single_pair_is_never_misaligned(make_stage, monkeypatch) -> None:
    """Rolled by one, a batch of one is itself: a true pair that would be called fake."""
    seen: list[int] = []
    adversary = loss_of(make_stage(), Adversarial)
    original = adversary.features
    monkeypatch.setattr(adversary, "features", lambda u0, t, c: (seen.append(len(u0)), original(u0, t, c))[1])
    context = adversary.teacher.encode_caption(torch.randn(1, 3, 16))
    adversary.discriminator_loss(torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4), context)
    assert seen == [1, 1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_published_weights_are_bf16_and_train_all_the_same(
    teacher: Path, tmp_path: Path, precision: str
) -> None:
    folder = tmp_path / "published"
    shutil.copytree(teacher, folder)
    for part, cls in (("transformer", SanaTransformer2DModel), ("vae", AutoencoderDC)):
        save_model(load_model(cls, teacher / part), folder / part, dtype=torch.bfloat16)
    run = parse({**hybrid_run(tmp_path / "run", folder, steps=2), "precision": precision})
    stage = StudentStage(run, report=silent)
    loop.run(stage, run, report=silent, should_stop=lambda: False)
    assert (tmp_path / "run" / "final" / "model_index.json").is_file()
