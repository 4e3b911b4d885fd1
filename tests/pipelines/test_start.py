"""Starts from noise, from a picture, and from a picture of which a part is drawn."""

import math

import pytest
import torch

from sana_sprint.pipelines.start import from_image, from_image_and_mask, from_noise
from sana_sprint.sampling import at_any_step, consistency, schedule

SHAPE = (2, 3, 8, 8)


def normal(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


CLEAN, NOISE = normal(0), normal(1)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_strength_one_is_the_start_from_noise_and_zero_the_picture(num_steps):
    times = schedule(num_steps)
    whole = from_image(CLEAN, NOISE, times, 1.0)
    assert torch.equal(whole.u, from_noise(NOISE, times).u)
    assert whole.times == tuple(times)
    none = from_image(CLEAN, NOISE, times, 0.0)
    assert none.times == (0.0,)
    assert torch.equal(none.u, CLEAN)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_the_distance_to_the_picture_grows_with_strength(num_steps):
    starts = [from_image(CLEAN, NOISE, schedule(num_steps), s / 20) for s in range(1, 21)]
    # Each is on the circle through picture and noise.
    for start in starts[:-1]:
        t = start.times[0]
        torch.testing.assert_close(start.u, math.cos(t) * CLEAN + math.sin(t) * NOISE)
    distances = [(start.u - CLEAN).square().mean().item() for start in starts]
    assert distances == sorted(distances)
    assert {len(start.times) for start in starts} == {num_steps + 1}
    assert all(a > b for start in starts for a, b in zip(start.times, start.times[1:], strict=False))


@pytest.mark.parametrize("strength", [-0.1, 1.1, math.nan])
def test_other_strengths_are_refused(strength):
    with pytest.raises(ValueError, match="strength must be from 0"):
        from_image(CLEAN, NOISE, [1.5, 0.0], strength)


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_the_known_part_is_noised_like_the_rest_and_returns_unchanged(strength):
    mask = (torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(3)) < 0.5).float()
    start = from_image_and_mask(CLEAN, mask, NOISE, schedule(2), strength)
    known = mask.expand(SHAPE) == 0
    t = start.times[0]
    expected = math.cos(t) * CLEAN + math.sin(t) * NOISE
    torch.testing.assert_close(start.u[known], expected[known])
    drawn = consistency(
        at_any_step(lambda u, t: torch.tanh(u)),
        start.u,
        start.times,
        draw_noise=lambda: normal(4),
        constrain=start.constrain,
    )
    assert torch.equal(drawn[known], CLEAN[known])
    assert not torch.isclose(drawn[~known], CLEAN[~known]).any()


def test_a_mask_of_everything_is_the_start_from_noise():
    start = from_image_and_mask(CLEAN, torch.ones(1, 1, 8, 8), NOISE, [1.5, 0.7, 0.0])
    assert torch.equal(start.u, NOISE)
    assert start.constrain is not None
    assert torch.equal(start.constrain(normal(5), 0), normal(5))


@pytest.mark.parametrize("shape", [(1, 1, 4, 4), (3, 1, 8, 8), (1, 3, 8, 8), (8, 8)])
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"the mask must be \(1 or 2,1,8,8\)"):
        from_image_and_mask(CLEAN, torch.ones(shape), NOISE, [1.5, 0.0])


# ----- Gaussian data, where everything is known -----------------------------------------------------------------------

# Two values of variance 1, correlated by RHO, stand for a picture (B,1,1,2). Its exact consistency function is linear.
RHO = 0.8
BASIS = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2)
VARIANCES = torch.tensor([1 + RHO, 1 - RHO])  # along the basis


def consistency_matrix(t: float) -> torch.Tensor:
    """The map of u at angle t to the end of its path: each direction of the basis is scaled to the data's deviation."""
    scales = torch.sqrt(VARIANCES / (math.cos(t) ** 2 * VARIANCES + math.sin(t) ** 2))
    return BASIS @ torch.diag(scales) @ BASIS.T


def exact(u, t, step):
    angle = t[0].item()
    return (math.cos(angle) * u - u @ consistency_matrix(angle)) / math.sin(angle)


class Draws:
    """Unit noise, and pictures of the data."""

    def __init__(self, count: int) -> None:
        self.count, self.generator = count, torch.Generator().manual_seed(0)

    def noise(self) -> torch.Tensor:
        return torch.randn(self.count, 1, 1, 2, generator=self.generator)

    def pictures(self) -> torch.Tensor:
        return self.noise() @ torch.diag(VARIANCES.sqrt()) @ BASIS.T


def sample(start, draws):
    return consistency(exact, start.u, start.times, draw_noise=draws.noise, constrain=start.constrain)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_a_picture_becomes_another_of_the_same_distribution_the_farther_the_stronger(num_steps):
    draws, distances = Draws(100_000), []
    pictures = draws.pictures()
    for strength in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        start = from_image(pictures, draws.noise(), schedule(num_steps), strength)
        drawn = sample(start, draws)
        covariance = torch.cov(drawn.reshape(-1, 2).T)
        # The standard error of a variance from 100,000 draws is 0.0045.
        torch.testing.assert_close(covariance, torch.tensor([[1.0, RHO], [RHO, 1.0]]), atol=0.02, rtol=0)
        distances.append((drawn - pictures).square().mean().item())
    assert distances == sorted(distances)
    assert distances[0] == 0
    assert distances[-1] == pytest.approx(2, abs=0.03)  # independent pictures of variance 1


def test_one_step_from_a_picture_is_as_far_as_the_consistency_function_says():
    draws = Draws(100_000)
    pictures = draws.pictures()
    start = from_image(pictures, draws.noise(), schedule(1), 0.5)
    t, covariance = start.times[0], torch.tensor([[1.0, RHO], [RHO, 1.0]])
    # E|x' - x|^2 of x' = M (cos t x + sin t n), whose covariance is that of x: 2 tr(C) - 2 cos t tr(M C), over 2 values.
    expected = (2 - math.cos(t) * torch.trace(consistency_matrix(t) @ covariance)).item()
    assert (sample(start, draws) - pictures).square().mean().item() == pytest.approx(expected, rel=0.02)


def slope_and_rest(drawn: torch.Tensor) -> tuple[float, float]:
    """The regression of the drawn value on the known one, and the variance that it leaves."""
    known, free = drawn[:, 0, 0, 0], drawn[:, 0, 0, 1]
    slope = (known @ free / (known @ known)).item()
    return slope, (free - slope * known).var().item()


SECOND_IS_DRAWN = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_the_drawn_part_follows_the_known_one_as_the_consistency_function_says(num_steps):
    draws = Draws(100_000)
    times = schedule(num_steps)
    drawn = sample(from_image_and_mask(draws.pictures(), SECOND_IS_DRAWN, draws.noise(), times), draws)
    # Each step draws M_21 u_1 + M_22 u_2 with u_i = cos t x_i + sin t n_i. The first u_2 is noise alone.
    slope, variance = 0.0, 1.0  # of u_2: its part of the known value, and the variance of the rest
    for i, t in enumerate(times[:-1]):
        if i:
            slope, variance = math.cos(t) * slope, math.cos(t) ** 2 * variance + math.sin(t) ** 2
        (_, to_known), (_, to_drawn) = consistency_matrix(t).tolist()
        slope = to_known * math.cos(t) + to_drawn * slope
        variance = (to_known * math.sin(t)) ** 2 + to_drawn**2 * variance
    found = slope_and_rest(drawn)
    assert found == pytest.approx((slope, variance), abs=0.02)


def test_with_many_steps_the_drawn_part_has_the_distribution_given_the_known_one():
    draws = Draws(20_000)
    found = []
    for num_steps in (2, 16, 128, 1024):
        start = from_image_and_mask(
            draws.pictures(),
            SECOND_IS_DRAWN,
            draws.noise(),
            torch.linspace(math.pi / 2, 0, num_steps + 1).tolist(),
        )
        found.append(slope_and_rest(sample(start, draws)))
    slopes, rests = zip(*found, strict=True)
    assert slopes == tuple(sorted(slopes))
    assert rests == tuple(sorted(rests, reverse=True))
    # Given the first, the second has mean RHO times it and variance 1 - RHO^2.
    assert found[-1] == pytest.approx((RHO, 1 - RHO**2), abs=0.04)


def test_between_zero_and_one_a_mask_blends_two_clean_estimates_under_one_noise():
    draws = Draws(100_000)
    pictures, mask = draws.pictures(), torch.full((1, 1, 1, 2), 0.5)
    start, seen = from_image_and_mask(pictures, mask, draws.noise(), [1.5, 0.7, 0.0]), []
    consistency(
        exact,
        start.u,
        start.times,
        draw_noise=draws.noise,
        constrain=start.constrain,
        on_step=lambda i, t, u: seen.append(u),
    )
    # The estimates are independent, so their mean has half the variance; the noise keeps all of its own.
    expected = math.cos(0.7) ** 2 / 2 + math.sin(0.7) ** 2
    assert seen[0].var().item() == pytest.approx(expected, rel=0.02)
