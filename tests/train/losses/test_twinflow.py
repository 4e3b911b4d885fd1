"""TwinFlow: its terms where the answer is known, against the equations written again, and in a stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sana_sprint.train.losses import TwinFlow
from sana_sprint.train.losses.twinflow import consistency_error, rectification, twin_loss
from sana_sprint.train.stages.base import Part
from sana_sprint.trigflow import Velocity
from tests.helpers.toy_stage import assert_same
from tests.helpers.training import chain, loss_of, make, parse, student_run, train

SHAPE = (64, 1, 2, 2)


def expand(s: torch.Tensor) -> torch.Tensor:
    return s[:, None, None, None]


def flow_of(mean: float, deviation: float) -> Velocity:
    """E[z - x0 | x_s] for data N(mean, deviation^2)."""

    def velocity(x: torch.Tensor, flow_t: torch.Tensor) -> torch.Tensor:
        s = expand(flow_t)
        variance = (1 - s) ** 2 * deviation**2 + s**2
        return -mean + (s - (1 - s) * deviation**2) / variance * (x - (1 - s) * mean)

    return velocity


def consistency_velocity(mean: float, deviation: float) -> Velocity:
    """The v whose clean prediction x - s v is the end of that flow's path."""

    def velocity(x: torch.Tensor, flow_t: torch.Tensor) -> torch.Tensor:
        s = expand(flow_t)
        end = mean + deviation * (x - (1 - s) * mean) / ((1 - s) ** 2 * deviation**2 + s**2).sqrt()
        return (x - end) / s

    return velocity


def test_an_exact_consistency_function_has_no_error() -> None:
    torch.manual_seed(0)
    x, s = torch.randn(SHAPE, dtype=torch.float64), torch.rand(SHAPE[0], dtype=torch.float64) * 0.9 + 0.1
    exact = consistency_velocity(0.5, 0.4)
    path = flow_of(0.5, 0.4)(x, s)
    errors = [consistency_error(exact(x, s), x, s, path, exact, d).abs().max().item() for d in (0.004, 0.002)]
    # The straight step leaves the curved path by a distance that is quadratic in d, so the error is linear in it.
    assert errors[0] < 0.05
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.1)
    assert (
        consistency_error(path, x, s, path, exact, 0.002).abs().max() > 0.5
    )  # the velocity of the path is none


def test_near_the_data_the_error_is_that_of_flow_matching() -> None:
    x, found, path = (torch.randn(SHAPE, dtype=torch.float64) for _ in range(3))
    s = torch.full((SHAPE[0],), 0.004, dtype=torch.float64)
    error = consistency_error(0.3 * found, x, s, 0.3 * path, flow_of(0.0, 1.0), 0.01)
    torch.testing.assert_close(error, (0.3 * (found - path)).clamp(-1, 1))


def test_the_error_equals_the_papers_equation_written_again() -> None:
    """F - clamp((F s - P) / d - v) of RCGM with P = (s - d) F_target(x', s - d), elementwise."""
    torch.manual_seed(1)
    x, found, path = (torch.randn(SHAPE, dtype=torch.float64) for _ in range(3))
    s, d = torch.rand(SHAPE[0], dtype=torch.float64) * 0.5 + 0.4, 0.01
    target = flow_of(0.2, 0.7)
    moved = x - d * path
    displacement = expand(s - d) * target(moved, s - d)
    expected = ((expand(s) * found - displacement) / d - path).clamp(-1, 1)
    torch.testing.assert_close(
        consistency_error(found, x, s, path, target, d), expected, rtol=1e-4, atol=1e-4
    )  # the target is rounded to fp32, and the difference divided by d


def test_equal_distributions_rectify_nothing_and_others_move_towards_the_data() -> None:
    torch.manual_seed(2)
    fake, noise, s = torch.randn(SHAPE) + 1, torch.randn(SHAPE), torch.rand(SHAPE[0]) * 0.9 + 0.05

    def student(x: torch.Tensor, flow_t: torch.Tensor) -> torch.Tensor:
        assert (flow_t < 0).all()
        return flow_of(1.0, 1.0)(x, -flow_t)

    assert not rectification(fake, noise, s, flow_of(1.0, 1.0), student).any()
    move = rectification(fake, noise, s, flow_of(-1.0, 1.0), student)
    assert (move < 0).all()  # the data lie at -1


def test_the_twin_is_trained_at_negative_time_on_the_students_pictures() -> None:
    torch.manual_seed(3)
    fake, noise, s = (torch.randn(SHAPE) for _ in range(2)), None, torch.rand(SHAPE[0])
    fake, noise = fake
    seen = []

    def student(x: torch.Tensor, flow_t: torch.Tensor) -> torch.Tensor:
        seen.append((x, flow_t))
        return noise - fake

    assert twin_loss(student, fake, noise, s).item() == 0
    ((x, flow_t),) = seen
    assert torch.equal(flow_t, -s)
    torch.testing.assert_close(x, (1 - expand(s)) * fake + expand(s) * noise)


def run(output: Path, **changes: object) -> dict[str, object]:
    values = student_run(output, chain() / "teacher" / "final", steps=4)
    return {**values, "scm_weight": 0.0, "twinflow": {"warmup_steps": 0, **changes}}


def test_it_trains_alone_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    train(run(tmp_path / "whole"))
    first = {**run(tmp_path / "stopped")}
    train({**first, "schedule": {**first["schedule"], "steps": 2}})
    train(first)
    assert_same(tmp_path / "whole", tmp_path / "stopped")


def test_every_term_reaches_the_student_and_only_it(tmp_path: Path) -> None:
    for changes in ({}, {"rectification_weight": 0.0}, {"adversarial_weight": 0.0}):
        stage = make(parse(run(tmp_path / "run", **changes)))
        assert set(stage.players) == {"student"}
        loss, metrics = stage.loss(Part(3, range(4)))
        loss.backward()
        expected = {"twinflow_consistency_loss"}
        expected |= {"twinflow_adversarial_loss"} if changes.get("adversarial_weight", 1) else set()
        expected |= {"twinflow_rectification_loss"} if changes.get("rectification_weight", 1) else set()
        assert set(metrics) == expected
        assert any(p.grad is not None and p.grad.any() for p in stage.players["student"].parameters())
        assert all(p.grad is None for p in stage.kept["averaged_student"].parameters())


def test_the_target_follows_the_student_once_a_step(tmp_path: Path) -> None:
    stage = make(parse(run(tmp_path / "run", ema_decay=0.5)))
    target = loss_of(stage, TwinFlow).kept["averaged_student"]
    (live, average) = (next(iter(module.parameters())) for module in (stage.models.trained, target))
    with torch.no_grad():
        live.add_(1.0)
    before = average.clone()
    for _ in range(2):  # two parts of one step
        stage.loss(Part(100, range(4)))
    torch.testing.assert_close(average, (before + live) / 2)
