"""TrigFlow formulas against their definitions, in fp64."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from sana_sprint import trigflow

ANGLES = torch.linspace(0.01, math.pi / 2, 50, dtype=torch.float64)
TIGHT = 1e-12  # fp64 rounding of a dozen operations on numbers near 1


def test_times_convert_back_and_keep_the_signal_to_noise_ratio() -> None:
    s = trigflow.trig_to_flow(ANGLES)
    torch.testing.assert_close(trigflow.flow_to_trig(s), ANGLES, rtol=0, atol=TIGHT)
    # s/(1-s) = tan t, without dividing by the zero at pi/2
    torch.testing.assert_close(s * torch.cos(ANGLES), (1 - s) * torch.sin(ANGLES), rtol=0, atol=TIGHT)


def test_sigma_is_the_noise_to_signal_ratio_in_data_space() -> None:
    t = trigflow.sigma_to_trig(torch.tensor([200.0], dtype=torch.float64))
    assert abs(t.item() - 1.5682963320032104) < TIGHT  # arctan(200 / 0.5): the paper's two-step start


def paper_output(u: torch.Tensor, t: torch.Tensor, velocity: trigflow.Velocity) -> torch.Tensor:
    """Equations 6 to 8 as printed, in data space with sigma_d."""
    sigma_d = 0.5
    x_t = u * sigma_d
    angle = t[:, None, None, None]
    s = torch.sin(angle) / (torch.sin(angle) + torch.cos(angle))
    root = torch.sqrt(s**2 + (1 - s) ** 2)
    x_flow = x_t / sigma_d * root
    v = velocity(x_flow, s.flatten())
    return ((1 - 2 * s) * x_flow + (1 - 2 * s + 2 * s**2) * v) / root


def test_denoiser_equals_the_papers_equations() -> None:
    u = torch.randn(50, 3, 4, 2, dtype=torch.float64)

    def velocity(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x * 1.7) + s[:, None, None, None] ** 2

    ours = trigflow.flow_denoiser(velocity)(u, ANGLES)
    torch.testing.assert_close(ours, paper_output(u, ANGLES, velocity), rtol=0, atol=TIGHT)


def test_the_optimum_for_gaussian_data_is_zero() -> None:
    """For unit Gaussian data the best velocity is linear in x, and F must vanish at every angle."""

    def velocity(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        s = s[:, None, None, None]
        return x * (2 * s - 1) / (s**2 + (1 - s) ** 2)  # E[z - x0 | x] for x = (1-s) x0 + s z

    F = trigflow.flow_denoiser(velocity)(torch.randn(50, 2, 3, 3, dtype=torch.float64), ANGLES)
    assert F.abs().max() < TIGHT


@given(st.floats(0.0, math.pi / 2), st.integers(0, 2**31))
def test_noising_with_known_noise_is_undone_by_the_consistency_function(angle: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    u0, noise = torch.randn(2, 2, 1, 3, 3, generator=generator, dtype=torch.float64)
    t = torch.tensor([angle, angle / 2], dtype=torch.float64)
    u = trigflow.add_noise(u0, noise, t)
    cos, sin = torch.cos(t)[:, None, None, None], torch.sin(t)[:, None, None, None]
    F = cos * noise - sin * u0  # du/dt, the exact velocity of this pair
    torch.testing.assert_close(trigflow.to_clean(u, F, t), u0, rtol=0, atol=TIGHT)


def test_training_times_follow_their_density() -> None:
    t = trigflow.lognormal_times(40_000, mean=0.2, std=1.6)
    quantiles = torch.quantile(t, torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]))
    expected = torch.atan(torch.exp(0.2 + 1.6 * torch.tensor([-1.6449, -0.6745, 0.0, 0.6745, 1.6449])) / 0.5)
    # The sampling error of a quantile of 40,000 draws is below 0.01 for this density; three of those.
    torch.testing.assert_close(quantiles, expected, rtol=0, atol=0.03)
