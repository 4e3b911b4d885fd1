"""Distillation in the plane, where the teacher is exact and so is the answer: the losses reach it, broken ones do not."""

import math

import pytest
import torch

from recipes.toy import losses as compared
from recipes.toy import world
from recipes.toy.distil import Student, distil, measure, sliced_wasserstein
from sana_sprint.train.losses.scm import consistency_target
from sana_sprint.trigflow import flow_denoiser


def test_data_have_unit_variance() -> None:
    data = world.draw(50_000)
    # Standard errors of mean and covariance are at most 1.5/sqrt(50,000) = 0.007; four of those.
    torch.testing.assert_close(data.mean(0), torch.zeros(2), rtol=0, atol=0.03)
    torch.testing.assert_close(data.T.cov(), torch.eye(2), rtol=0, atol=0.03)


def test_the_closed_velocity_is_the_one_that_flow_matching_learns() -> None:
    """E[z - x0 | x] is orthogonal to its own error against every function of x, here a few waves."""
    x0, z = world.draw(200_000).double(), torch.randn(200_000, 2, dtype=torch.float64)
    for s in (0.1, 0.5, 0.9):
        x = (1 - s) * x0 + s * z
        error = z - x0 - world.velocity(x, torch.full((len(x),), s, dtype=torch.float64))
        for frequency in (0.5, 1.0, 3.0):
            for wave in (torch.sin(frequency * x), torch.cos(frequency * x)):
                # Each is a mean of 200,000 numbers of variance below 2: four standard errors.
                assert (wave.T @ error / len(x)).abs().max() < 4 * math.sqrt(2 / len(x))


def test_the_exact_consistency_function_is_constant_on_paths_and_ends_in_the_data() -> None:
    noise, top = torch.randn(2000, 2, dtype=torch.float64), torch.full((2000,), math.pi / 2)
    path = world.follow(world.teacher, noise, top.double())
    finer = world.follow(world.teacher, noise, top.double(), num_steps=200)[-1]
    # A fourth-order method's error falls 16 times when the step is halved, so this is its error; a thousandth of the
    # smallest error that a student is measured to make.
    assert (path[-1] - finer).abs().max() < 1e-4
    torch.testing.assert_close(world.exact(path[40], top.double() * 0.6), path[-1], rtol=0, atol=1e-4)
    # Two sets of 2000 samples of the data are 0.06 apart.
    assert sliced_wasserstein(path[-1].float(), world.draw(2000)) < 0.1


def test_sliced_distance_of_a_shift_and_of_a_scaling() -> None:
    points = torch.randn(1000, 2)
    assert sliced_wasserstein(points, points[torch.randperm(1000)]) < 1e-6  # fp32 sums in another order
    assert sliced_wasserstein(points, points + torch.tensor([0.3, -0.4])) == pytest.approx(0.5, rel=1e-4)
    expected = (
        points.square().sum(1).mean().sqrt().item()
    )  # a line's best matching is x -> 2x, and so is the plane's
    assert sliced_wasserstein(points, 2 * points) == pytest.approx(
        expected, rel=0.01
    )  # 64 directions, not all


def test_one_step_samples_reach_the_data() -> None:
    got = measure(distil())
    # Four seeds gave 0.07 to 0.08, where two sets of data are 0.05 apart and the teacher's own single step 1.4.
    assert got.one_step < 0.12
    assert got.two_steps < 0.12
    assert got.floor < 0.06
    assert got.teacher > 1.2
    # The same noise ends where the teacher's path ends, within 0.11 to 0.12: spots are 0.3 wide and 1.6 apart.
    assert got.error < 0.18
    assert got.error_midway < 0.18


def _flipped_tangent(F, teacher_F, tangent, u, t, *, tangent_weight):
    return consistency_target(F, teacher_F, -tangent, u, t, tangent_weight=tangent_weight)


def _without_u(F, teacher_F, tangent, u, t, *, tangent_weight):
    return consistency_target(F, teacher_F, tangent, torch.zeros_like(u), t, tangent_weight=tangent_weight)


@pytest.mark.parametrize(
    ("target", "reaches"),
    [
        (consistency_target, True),
        (_flipped_tangent, False),
        (_without_u, False),
    ],
)
def test_only_the_whole_loss_leads_there(target, reaches) -> None:
    """A part of the training is enough to tell: the whole loss is at 0.30 to 0.36 by then, each broken one at 1.4 or more."""
    got = measure(distil(num_steps=400, target=target), count=1000)
    assert (got.error < 0.5) == reaches  # a NaN, where a broken loss may end, is not below anything


def test_a_student_is_a_velocity_at_negative_time_too() -> None:
    """At positive times the inverse of the change of variables; at negative ones finite, -1/2 (an angle of -pi/4) included."""
    torch.manual_seed(0)
    student, x = Student().double(), torch.randn(64, 2, dtype=torch.float64)
    velocity = compared.velocity_of(student)
    t = torch.rand(64, dtype=torch.float64) * math.pi / 2
    torch.testing.assert_close(flow_denoiser(velocity)(x, t), student(x, t))
    for flow_t in (-1.0, -0.5, -1e-9, 0.0, 1.0):
        found = velocity(x, torch.full((64,), flow_t, dtype=torch.float64))
        assert found.isfinite().all()
        assert found.abs().max() < 10
    half = torch.full((64,), 0.5, dtype=torch.float64)
    assert not torch.allclose(velocity(x, half), velocity(x, -half))


@pytest.mark.parametrize("name", compared.METHODS)
def test_every_compared_loss_spends_its_compute_and_trains(name: str) -> None:
    torch.manual_seed(0)
    before = Student()
    torch.manual_seed(0)
    after = compared.distil(compared.METHODS[name], passes=200)
    moved = [
        (a - b).abs().max().item()
        for a, b in zip(after.net.parameters(), before.net.parameters(), strict=True)
    ]
    assert min(moved) > 0
    assert all(math.isfinite(value) for value in compared.scores(after, count=100).values())


def test_twinflow_leads_towards_the_data() -> None:
    torch.manual_seed(0)
    found = compared.scores(compared.distil(compared.METHODS["TwinFlow"], passes=1000), count=1000)
    assert found["error"] < 1.0  # the teacher's single step: 1.4
