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


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"the mask must be \(batch,1,8,8\)"):
        from_image_and_mask(CLEAN, torch.ones(1, 1, 4, 4), NOISE, [1.5, 0.0])
