"""f-distill's weighting: against the divergences themselves, on Gaussian data, and in a stage."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from sana_sprint.train.losses import DistributionMatching, FDivergenceMatching
from sana_sprint.train.losses.adversarial import logistic_discriminator, logistic_generator
from sana_sprint.train.losses.distribution_matching import MatchingConfig
from sana_sprint.train.losses.f_divergence import WEIGHTS, factors_of
from sana_sprint.train.stages.base import Part
from sana_sprint.trigflow import Velocity, expand_like
from tests.helpers.toy_stage import assert_same
from tests.helpers.training import chain, loss_of, make, parse, student_run, train

# The generators f of D_f(p || q) = E_q[f(p/q)], from their definitions.
GENERATORS = {
    "reverse-kl": lambda r: -r.log(),
    "softened-reverse-kl": lambda r: (r + 1) * ((r + 1) / (2 * r)).log(),
    "jensen-shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "squared-hellinger": lambda r: (1 - r.sqrt()) ** 2,
    "forward-kl": lambda r: r * r.log(),
    "jeffreys": lambda r: (r - 1) * r.log(),
    "neyman": lambda r: (1 - r) ** 2 / r,
}


def test_every_divergence_has_its_definition() -> None:
    assert set(WEIGHTS) == set(GENERATORS)


@pytest.mark.parametrize("divergence", GENERATORS)
def test_the_weight_is_the_second_derivative_times_the_squared_ratio(divergence: str) -> None:
    """Up to a constant, over eight decades: f'' by automatic differentiation."""
    r = torch.logspace(-4, 4, 81, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(GENERATORS[divergence](r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    quotient = WEIGHTS[divergence](r.detach()) / (second * r.detach() ** 2)
    torch.testing.assert_close(quotient, quotient[40].expand(81), rtol=1e-6, atol=0)


def test_reverse_kl_weighs_every_picture_by_one_exactly() -> None:
    torch.manual_seed(0)
    weights = factors_of(30 * torch.randn(37), torch.rand(37), "reverse-kl")
    assert torch.equal(weights, torch.ones(37))


@pytest.mark.parametrize("divergence", GENERATORS)
def test_weights_equal_the_papers_steps_written_again(divergence: str) -> None:
    torch.manual_seed(1)
    log_r, flow_t = 2 * torch.randn(40), torch.rand(40)
    found = factors_of(log_r, flow_t, divergence, time_bins=3)
    ratios = [min(max(math.exp(each), 0.1), 20.0) for each in log_r.double().tolist()]
    bins = [min(int(3 * s), 2) for s in flow_t.tolist()]
    means = {
        b: sum(r for r, at in zip(ratios, bins, strict=True) if at == b) / bins.count(b) for b in set(bins)
    }
    normalised = torch.tensor([r / means[b] for r, b in zip(ratios, bins, strict=True)], dtype=torch.float64)
    h = WEIGHTS[divergence](normalised)
    torch.testing.assert_close(found.double(), h / h.mean(), rtol=1e-5, atol=0)
    assert found.mean().item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("divergence", GENERATORS)
@pytest.mark.parametrize("extreme", [-1e30, 1e30, math.inf, -math.inf])
def test_extreme_logits_and_times_have_finite_weights(divergence: str, extreme: float) -> None:
    log_r = torch.tensor([extreme, 0.0, extreme, 0.0])
    weights = factors_of(log_r, torch.tensor([0.0, 0.0, 1.0, 1.0]), divergence)
    assert weights.isfinite().all()
    assert (weights > 0).all()


def test_the_level_of_the_logits_at_a_time_does_not_count() -> None:
    torch.manual_seed(2)
    log_r, flow_t = 0.3 * torch.randn(32), torch.arange(32) / 32
    level = (flow_t >= 0.5).float()  # of half of the bins
    found, moved = (
        factors_of(each, flow_t, "forward-kl", bounds=(1e-3, 1e3)) for each in (log_r, log_r + level)
    )
    torch.testing.assert_close(found, moved)


def test_the_best_logit_of_the_logistic_loss_is_the_log_ratio() -> None:
    """N(0, 1) against N(1, 1), whose log ratio is 1/2 - x: the loss is least there, among lines."""
    torch.manual_seed(3)
    real, fake = torch.randn(20_000, dtype=torch.float64), 1 + torch.randn(20_000, dtype=torch.float64)
    line = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
    loss, _ = logistic_discriminator(line[0] + line[1] * real, line[0] + line[1] * fake)
    (gradient,) = torch.autograd.grad(loss, line)
    assert gradient.abs().max() < 4 / math.sqrt(20_000)  # terms of size 1: four standard errors
    wrong, _ = logistic_discriminator(2 * (0.5 - real), 2 * (0.5 - fake))
    assert wrong > loss + 0.01


def test_the_logistic_losses_at_known_logits() -> None:
    loss, metrics = logistic_discriminator(torch.tensor([2.0]), torch.tensor([-1.0]))
    assert loss.item() == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.exp(-1))) / 2)
    assert metrics == {"real_logit": 2.0, "fake_logit": -1.0}
    assert logistic_generator(torch.tensor([-3.0])).item() == pytest.approx(math.log1p(math.exp(3)))


def gaussian(mean: float) -> Velocity:
    """The exact velocity of data N(mean, 1)."""

    def velocity(x: torch.Tensor, flow_t: torch.Tensor) -> torch.Tensor:
        s = expand_like(flow_t, x)
        return -mean + (2 * s - 1) / ((1 - s) ** 2 + s**2) * (x - (1 - s) * mean)

    return velocity


def make_matching() -> DistributionMatching:
    config = MatchingConfig.model_validate({"optimizer": {}})
    return DistributionMatching(config, None, nn.Identity())  # type: ignore[arg-type]  # its fake model is passed


def gradient(fake: torch.Tensor, weigh: object, teacher: float = -1.0) -> torch.Tensor:
    fake = fake.clone().requires_grad_()
    torch.manual_seed(5)
    loss = make_matching().student_loss(fake, gaussian(teacher), gaussian(1.0), weigh=weigh)  # type: ignore[arg-type]
    return torch.autograd.grad(loss, fake)[0]


def exact(divergence: str):
    """Weights from the exact log ratio of N(-1, 1) to N(1, 1), both noised: a sum over elements of -2 (1-s) x / variance."""

    def weigh(x: torch.Tensor, flow_t: torch.Tensor) -> torch.Tensor:
        s = expand_like(flow_t, x)
        log_ratio = (-2 * (1 - s) * x / ((1 - s) ** 2 + s**2)).flatten(1).sum(1)
        return factors_of(log_ratio, flow_t, divergence)

    return weigh


def test_reverse_kl_is_plain_matching_bit_for_bit_and_others_are_not() -> None:
    torch.manual_seed(4)
    fake = 1 + torch.randn(64, 1, 1, 1)
    plain = gradient(fake, None)
    assert torch.equal(gradient(fake, exact("reverse-kl")), plain)
    covering = gradient(fake, exact("forward-kl"))
    assert not torch.allclose(covering, plain)
    # The factor is per picture: the direction stays.
    assert torch.equal(covering.sign(), plain.sign())
    # Pictures that the data make likely, here those with small values, weigh more.
    factor = (covering / plain).flatten()
    ordered = fake.flatten().argsort()
    assert factor[ordered[:16]].mean() > 2 * factor[ordered[-16:]].mean()


@pytest.mark.parametrize("divergence", GENERATORS)
def test_pictures_of_the_right_distribution_stay_under_every_divergence(divergence: str) -> None:
    fake = 1 + torch.randn(64, 1, 1, 1)
    assert not gradient(fake, exact(divergence), teacher=1.0).any()


def run(
    output: Path, divergence: str | None = "jensen-shannon", **discriminator: object
) -> dict[str, object]:
    values = student_run(output, chain() / "teacher" / "final", steps=6)
    constant = {"warmup_steps": 0, "decay_fraction": 0.0}  # rates do not depend on the number of steps
    judge = {"blocks": [0, 1], "loss": "logistic", "misaligned_pairs": False, "optimizer": constant}
    match: dict[str, object] = {"optimizer": constant, "warmup_steps": 0}
    values |= {"scm_weight": 0.0, "optimizer": constant, "discriminator": {**judge, **discriminator}}
    if divergence is None:
        return {**values, "matching": match}
    return {**values, "f_divergence": {**match, "divergence": divergence, "time_bins": 1}}


def losses_of(values: dict[str, object]) -> dict[str, float]:
    stage = make(parse(values))
    with torch.no_grad():  # a fake model that differs from the teacher, or nothing moves
        (matching,) = (loss for loss in stage.losses if isinstance(loss, DistributionMatching))  # type: ignore[attr-defined]
        matching.fake_model.proj_out.weight.add_(0.1)  # type: ignore[attr-defined]
    torch.manual_seed(0)
    return stage.loss(Part(step=3, indices=range(4)))[1]


def test_in_a_stage_reverse_kl_changes_no_bit_and_another_divergence_does(tmp_path: Path) -> None:
    plain = losses_of(run(tmp_path / "a", None))
    same = losses_of(run(tmp_path / "b", "reverse-kl"))
    assert same.pop("matching_factor_max") == 1
    assert same == plain
    other = losses_of(run(tmp_path / "c", "forward-kl"))
    assert other["adversarial_loss"] == plain["adversarial_loss"]
    assert other["matching_loss"] != plain["matching_loss"]
    assert other["matching_factor_max"] > 1


def test_a_weighted_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    train(run(tmp_path / "whole"))
    first = run(tmp_path / "stopped")
    train({**first, "schedule": {**first["schedule"], "steps": 4}})  # type: ignore[dict-item]
    train(first)
    assert_same(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"discriminator": None}, "there is no \\[discriminator\\]"),
        ({"discriminator": {"blocks": [0], "optimizer": {}}}, 'loss = "hinge" and misaligned_pairs = true'),
        ({"matching": {"optimizer": {}}}, "takes the place of \\[matching\\]"),
    ],
)
def test_a_stage_file_that_gives_no_density_ratios_or_two_matchings_is_refused(
    changes: dict[str, object], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match=said):
        parse({**run(tmp_path), **changes})


def test_its_players_are_those_of_matching_and_the_discriminator(tmp_path: Path) -> None:
    stage = make(parse(run(tmp_path)))
    assert set(stage.players) == {"student", "discriminator", "fake_model"}
    assert loss_of(stage, FDivergenceMatching).players["fake_model"] is stage.players["fake_model"]
