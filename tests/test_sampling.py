"""Times, and the samplers."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sana_sprint.sampling import (
    PRESETS,
    PUBLISHED_INTERMEDIATE,
    PUBLISHED_MAX,
    at_any_step,
    consistency,
    euler,
    heun,
    schedule,
)
from sana_sprint.stopping import Interrupt, Stopped
from sana_sprint.trigflow import flow_denoiser

SHAPE = (2, 3, 4, 5)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=seeded(seed))


# ----- times ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_steps", "times"),
    [
        (1, [math.pi / 2, 0.0]),
        (2, [1.5683, 1.3, 0.0]),
        # 4-step points 1.5683, 1.3, 1.1, 0.6, 0 read at 1/3 and 2/3: 1.3 - 0.2/3 and 1.1 - 0.5 * 2/3
        (3, [1.5683, 1.3 - 0.2 / 3, 1.1 - 1 / 3, 0.0]),
        (4, [1.5683, 1.3, 1.1, 0.6, 0.0]),
        (8, [1.5683, 1.43415, 1.3, 1.2, 1.1, 0.85, 0.6, 0.3, 0.0]),
    ],
)
def test_times_of_the_paper_and_between(num_steps, times):
    assert schedule(num_steps) == pytest.approx(times, abs=1e-12)


def test_first_preset_time_is_arctan_200_over_sigma_data():
    assert PRESETS[2][0] == pytest.approx(math.atan(200 / 0.5), abs=1e-5)  # printed with four decimals


@given(st.integers(1, 300), st.none() | st.floats(1e-3, PUBLISHED_MAX))
def test_times_are_total_and_fall_strictly(num_steps, t_max):
    times = schedule(num_steps, max_timesteps=t_max)
    assert len(times) == num_steps + 1
    assert times[-1] == 0.0
    assert all(t > t_next for t, t_next in itertools.pairwise(times))
    assert t_max is None or times[0] == pytest.approx(t_max, rel=1e-12)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5, 20])
def test_default_arguments_of_the_published_pipeline_never_raise(num_steps):
    """The published scheduler refuses its own default intermediate time for every step count but 2."""
    times = schedule(num_steps, max_timesteps=PUBLISHED_MAX, intermediate_timesteps=PUBLISHED_INTERMEDIATE)
    assert times[0] == 1.57080
    assert times[1:] == schedule(num_steps)[1:]
    assert {type(t) for t in times} == {float}


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 20, 10_000])
def test_without_intermediate_time_distances_are_equal(num_steps):
    times = schedule(num_steps, max_timesteps=1.5, intermediate_timesteps=None)
    assert times == pytest.approx(np.linspace(1.5, 0, num_steps + 1), abs=1e-12)
    assert times[-1] == 0.0


def test_later_times_stay_below_a_smaller_first_time_or_shrink():
    assert schedule(4, max_timesteps=1.4) == [1.4, 1.3, 1.1, 0.6, 0.0]
    shrunk = schedule(4, max_timesteps=1.2)
    assert shrunk == pytest.approx([t * 1.2 / 1.5683 for t in (1.5683, 1.3, 1.1, 0.6, 0.0)], abs=1e-12)


def test_the_intermediate_time_is_that_of_two_steps():
    assert schedule(2, intermediate_timesteps=1.1) == [1.5683, 1.1, 0.0]


def test_the_default_intermediate_time_gives_way_to_a_first_time_below_it():
    assert schedule(2, max_timesteps=1.2) == pytest.approx([1.2, 1.3 * 1.2 / 1.5683, 0.0], abs=1e-12)


@pytest.mark.parametrize(
    "given_times", [[1.5, 1.0, 0.5, 0.0], [1.5, 1.0, 0.5], torch.tensor([1.5, 1.0, 0.5])]
)
def test_custom_times_decide_the_number_of_steps(given_times):
    assert schedule(2, timesteps=given_times, max_timesteps=PUBLISHED_MAX) == [1.5, 1.0, 0.5, 0.0]
    assert schedule(2, timesteps=given_times, intermediate_timesteps=None) == [1.5, 1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "from 1 to 10000, got: 0"),
        ({"num_steps": 2.0}, "whole number, got: 2.0"),
        ({"num_steps": 1, "max_timesteps": 1.6}, "max_timesteps .* got: 1.6"),
        ({"num_steps": 1, "max_timesteps": 0}, "max_timesteps .* got: 0"),
        ({"num_steps": 1, "max_timesteps": math.nan}, "max_timesteps .* got: nan"),
        ({"num_steps": 1, "max_timesteps": "high"}, "max_timesteps must be a number, got: 'high'"),
        ({"num_steps": 2, "max_timesteps": 1.3, "intermediate_timesteps": 1.3}, "below .* 1.3; got: 1.3"),
        ({"num_steps": 2, "intermediate_timesteps": 0}, "intermediate_timesteps .* got: 0"),
        ({"num_steps": 2, "max_timesteps": None, "intermediate_timesteps": None}, "cannot both be None"),
        ({"num_steps": 3, "intermediate_timesteps": 1.3}, "for 2 steps, not for 3: .* got: 1.3"),
        ({"num_steps": 2, "timesteps": [1.0], "max_timesteps": 1.5708}, "max_timesteps .* got: 1.5708"),
        (
            {"num_steps": 2, "timesteps": [1.0], "intermediate_timesteps": 1.3},
            "intermediate_timesteps .* got: 1.3",
        ),
        ({"num_steps": 2, "timesteps": [1.0, 1.2]}, r"\[1.0, 1.2, 0.0\]"),
        ({"num_steps": 2, "timesteps": [1.0, 1.0, 0.0]}, "each below the one before"),
        ({"num_steps": 2, "timesteps": [1.6, 1.0]}, "at most 1.5708"),
        ({"num_steps": 2, "timesteps": [1.0, -0.1]}, "each below the one before"),
        ({"num_steps": 2, "timesteps": [math.nan, 0.5]}, "each below the one before"),
        ({"num_steps": 2, "timesteps": []}, "at least one time"),
        ({"num_steps": 2, "timesteps": [0.0]}, "at least one time"),
        ({"num_steps": 2, "timesteps": ["a"]}, "timesteps must be a number, got: 'a'"),
    ],
)
def test_bad_times_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        schedule(**arguments)


# ----- the loop -------------------------------------------------------------------------------------------------------


def test_renoising_adds_variances():
    """With F = 0 a jump multiplies by cos t; re-noising to t' scales by cos t' and adds variance sin^2 t'."""
    noise, generator = torch.randn(64, 4, 16, 16, generator=seeded()), seeded(1)
    found = consistency(
        lambda u, t, step: torch.zeros_like(u),
        noise,
        [1.0, 0.5, 0.2],
        draw_noise=lambda: torch.randn(noise.shape, generator=generator),
    )
    variance = 1.0
    for t, t_next in ((1.0, 0.5), (0.5, 0.2)):
        variance = variance * math.cos(t) ** 2 * math.cos(t_next) ** 2 + math.sin(t_next) ** 2
    # 65536 draws: the standard error of a variance is 0.55 %
    assert found.var().item() == pytest.approx(variance, rel=0.03)


def test_a_perfect_network_gives_the_data_from_any_time():
    """With F = cos t * noise - sin t * data, the jump from u = cos t * data + sin t * noise lands on the data."""
    data, noise = normal(0), normal(1)

    def denoiser(u, t, step):
        angle = t[:, None, None, None]
        return (torch.cos(angle) * u - data) / torch.sin(angle)

    for times in ([math.pi / 2, 0.0], [1.5, 0.7, 0.0]):
        found = consistency(denoiser, noise, times, draw_noise=lambda: normal(2))
        torch.testing.assert_close(found, data, atol=1e-5, rtol=0)  # a few fp32 roundings of numbers around 1


def test_denoiser_gets_fp32_angles_one_per_image():
    seen = []

    def denoiser(u, t, step):
        seen.append(t)
        return torch.zeros_like(u)

    consistency(denoiser, normal(0), [1.5, 1.3, 0.0], draw_noise=lambda: normal(1))
    assert [(t.tolist(), t.dtype) for t in seen] == [
        ([1.5] * 2, torch.float32),
        (pytest.approx([1.3] * 2), torch.float32),
    ]


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_noise_is_drawn_only_between_steps(num_steps):
    """The published scheduler also draws after the last step, where it has no effect but moves the generator on."""
    draws = []
    consistency(
        lambda u, t, step: u,
        normal(0),
        schedule(num_steps),
        draw_noise=lambda: draws.append(1) or normal(len(draws)),
    )
    assert len(draws) == num_steps - 1


@pytest.mark.parametrize("sampler", [consistency, euler, heun])
def test_on_step_sees_every_sample_and_may_replace_it_before_the_next_step(sampler):
    seen = []

    def on_step(i, t, u):
        seen.append((i, t, u.clone()))
        return torch.ones_like(u)

    def run(start, times, **settings):
        return sampler(lambda u, t, step: u, start, times, draw_noise=lambda: normal(1), **settings)

    final = run(normal(0), [1.5, 1.0, 0.0], on_step=on_step)
    assert [(i, t) for i, t, _ in seen] == [(0, 1.5), (1, 1.0)]
    # The second step began from ones; what replaced its own result came too late.
    assert torch.equal(final, run(torch.ones(SHAPE), [1.0, 0.0]))
    assert torch.equal(final, seen[-1][2])


@pytest.mark.parametrize("sampler", [consistency, euler, heun])
def test_an_interrupt_ends_with_the_clean_estimate_of_its_step(sampler):
    steps = []

    def on_step(i, t, u):
        steps.append(i)
        raise Interrupt

    def run(times, **settings):
        return sampler(lambda u, t, step: u, normal(0), times, draw_noise=lambda: normal(1), **settings)

    assert torch.equal(run([1.5, 1.0, 0.0], on_step=on_step), run([1.5, 0.0]))
    assert steps == [0]


# ----- differential equations with a known solution ------------------------------------------------------------------


DEVIATION = torch.tensor([0.05, 0.4, 1.0, 1.7], dtype=torch.float64)  # of Gaussian data, one for each channel
MEAN = torch.tensor([0.3, -1.0, 0.0, 2.0], dtype=torch.float64)


def gaussian(u: torch.Tensor, t: torch.Tensor, step: int) -> torch.Tensor:
    """F of Gaussian data: du/dt along paths u(t) = cos(t) mean + sqrt(cos(t)^2 deviation^2 + sin(t)^2) z."""
    angle = t.double()[:, None]
    variance = torch.cos(angle) ** 2 * DEVIATION**2 + torch.sin(angle) ** 2
    slope = torch.cos(angle) * torch.sin(angle) * (1 - DEVIATION**2) / variance
    return -torch.sin(angle) * MEAN + slope * (u - torch.cos(angle) * MEAN)


def final_error(sampler, num_steps: int) -> float:
    """The distance from the end of the path, where z is scaled by the data's deviation."""
    z = torch.randn(16, 4, dtype=torch.float64, generator=seeded())
    times = torch.linspace(math.pi / 2, 0, num_steps + 1, dtype=torch.float64).tolist()
    return (sampler(gaussian, z, times, draw_noise=no_noise) - (MEAN + DEVIATION * z)).abs().max().item()


def no_noise() -> torch.Tensor:
    raise AssertionError("a deterministic sampler drew noise")


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2)])
def test_deterministic_samplers_converge_with_their_order(sampler, order):
    coarse, fine = final_error(sampler, 200), final_error(sampler, 400)
    assert fine < 0.05
    # Angles are fp32, which is far below these errors; higher orders of h explain the rest.
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("sampler", [euler, heun])
def test_one_point_of_data_is_reached_exactly(sampler):
    data = normal(0).double()

    def denoiser(u, t, step):
        angle = t.double()[:, None, None, None]
        return (torch.cos(angle) * u - data) / torch.sin(angle)

    found = sampler(denoiser, normal(1).double(), [1.5, 0.9, 0.3, 0.0], draw_noise=no_noise)
    torch.testing.assert_close(found, data, atol=1e-6, rtol=0)  # angles are fp32


@pytest.mark.parametrize(
    ("sampler", "steps"), [(consistency, [0, 1, 2]), (euler, [0, 1, 2]), (heun, [0, 0, 1, 1, 2])]
)
def test_the_denoiser_gets_the_number_of_the_step_however_often_it_is_called(sampler, steps):
    seen = []

    def denoiser(u, t, step):
        seen.append(step)
        return torch.zeros_like(u)

    sampler(denoiser, normal(0), [1.5, 1.0, 0.5, 0.0], draw_noise=lambda: normal(1))
    assert seen == steps


@pytest.mark.parametrize("sampler", [consistency, euler, heun])
def test_a_constrained_clean_estimate_holds_at_every_time_and_at_the_end(sampler):
    known, mask = normal(7), torch.rand(SHAPE, generator=seeded(8)) < 0.5
    after = []

    def constrain(clean, step):
        return torch.where(mask, known, clean)

    found = sampler(
        lambda u, t, step: torch.tanh(u),
        normal(0),
        [1.5, 0.8, 0.0],
        draw_noise=lambda: normal(1),
        constrain=constrain,
        on_step=lambda i, t, u: after.append(u),
    )
    assert torch.equal(found[mask], known[mask])
    assert not torch.equal(found[~mask], known[~mask])
    if sampler is consistency:  # the known part is noised with the same noise as the rest
        expected = math.cos(0.8) * known + math.sin(0.8) * normal(1)
        torch.testing.assert_close(after[0][mask], expected[mask])


@pytest.mark.parametrize(("sampler", "evaluations"), [(consistency, 2), (euler, 2), (heun, 3)])
def test_a_call_can_be_stopped_before_any_evaluation(sampler, evaluations):
    calls = []

    def denoiser(u, t, step):
        calls.append(step)
        return torch.zeros_like(u)

    with pytest.raises(Stopped):
        sampler(
            denoiser,
            normal(0),
            [1.5, 1.0, 0.5, 0.0],
            draw_noise=lambda: normal(1),
            should_stop=lambda: len(calls) >= evaluations,
        )
    assert len(calls) == evaluations


def test_a_denoiser_of_two_arguments_is_adapted():
    found = consistency(at_any_step(lambda u, t: u), normal(0), [1.0, 0.0], draw_noise=lambda: normal(1))
    assert torch.equal(
        found, consistency(lambda u, t, step: u, normal(0), [1.0, 0.0], draw_noise=lambda: normal(1))
    )


def test_euler_is_eulers_method_on_the_flow_model():
    """The rotation of `euler` is x' = x + (s' - s) v in flow coordinates, x = u / (cos t + sin t)."""
    data = normal(7).double()

    def velocity(x, flow_t):
        return torch.tanh(x + data) - flow_t.double()[:, None, None, None]

    times = [1.5, 1.1, 0.5, 0.0]
    noise = normal(0).double()
    found = euler(at_any_step(flow_denoiser(velocity)), noise, times, draw_noise=no_noise)
    x = noise / (math.cos(times[0]) + math.sin(times[0]))
    for t, t_next in itertools.pairwise(times):
        s, s_next = (math.sin(a) / (math.sin(a) + math.cos(a)) for a in (t, t_next))
        x = x + (s_next - s) * velocity(x, torch.full((2,), s, dtype=torch.float64))
    torch.testing.assert_close(found, x, atol=1e-6, rtol=0)  # angles are fp32
