"""f-distill's factors: against each divergence's f by differentiation, and in a stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sana_sprint.train.losses import DistributionMatching, FDivergenceMatching
from sana_sprint.train.losses.f_divergence import WEIGHTS, factors_of
from sana_sprint.train.stages.base import Part
from tests.helpers.training import chain, full_run, loss_of, make, parse

# The generators f(r) of the divergences D_f = E_fake f(p_data / p_fake).
GENERATORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "reverse-kl": lambda r: -r.log(),
    "softened-reverse-kl": lambda r: (r + 1) * (0.5 + 0.5 / r).log(),
    "jensen-shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "squared-hellinger": lambda r: 1 - r.sqrt(),
    "forward-kl": lambda r: r * r.log(),
    "jeffreys": lambda r: (r - 1) * r.log(),
}


@pytest.mark.parametrize("divergence", sorted(WEIGHTS))
def test_factors_are_r_squared_times_the_second_derivative(divergence: Any) -> None:
    log_r = torch.linspace(-4, 4, 33, dtype=torch.float64)
    r = log_r.exp().requires_grad_()
    (first,) = torch.autograd.grad(GENERATORS[divergence](r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    h = (r**2 * second).detach()
    torch.testing.assert_close(factors_of(log_r, divergence), h / h.mean())


def run(tmp_path: Path, divergence: str) -> dict[str, Any]:
    values = full_run(tmp_path / "run", chain() / "teacher" / "final")
    section = {**values.pop("matching"), "divergence": divergence, "warmup_steps": 0}
    for name in ("trajectories", "twinflow"):
        del values[name]
    return {**values, "scm_weight": 0.0, "f_divergence": section}


def test_reverse_kl_is_distribution_matching_bit_for_bit(tmp_path: Path) -> None:
    weighed = run(tmp_path, "reverse-kl")
    section = {name: value for name, value in weighed["f_divergence"].items() if name != "divergence"}
    plain = {**{k: v for k, v in weighed.items() if k != "f_divergence"}, "matching": section}
    losses = []
    for values in (weighed, plain):
        stage = make(parse(values))
        torch.manual_seed(4)
        losses.append(stage.loss(Part(3, range(4)))[0])
    assert torch.equal(*losses)


def test_pictures_that_pass_for_data_weigh_more_under_forward_kl(tmp_path: Path) -> None:
    stage: Any = make(parse(run(tmp_path, "forward-kl")))
    loss = loss_of(stage, FDivergenceMatching)
    assert set(stage.players) == {"student", "discriminator", "fake_model"}
    x, flow_t = torch.randn(4, *stage.source.cache.shape), torch.full((4,), 0.5)
    context = stage.models.teacher.encode_caption(
        torch.randn(4, 3, stage.models.teacher.config.caption_channels)
    )
    with torch.no_grad():
        factors = loss.factors(x, flow_t, context)
    assert factors.mean().item() == pytest.approx(1)
    assert factors.std() > 0
    _, metrics = stage.loss(Part(0, range(4)))
    assert metrics["matching_factor_max"] >= 1


@pytest.mark.parametrize("missing", ["discriminator", None])
def test_it_needs_a_discriminator_and_replaces_matching(tmp_path: Path, missing: str | None) -> None:
    values = run(tmp_path, "forward-kl")
    if missing:
        del values[missing]
    else:
        values["matching"] = {"optimizer": {}}
    with pytest.raises(ValueError, match=r"needs a \[discriminator\]"):
        make(parse(values))
    assert issubclass(FDivergenceMatching, DistributionMatching)
