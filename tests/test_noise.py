"""Seeds, and the noise that comes from them."""

import pytest
import torch

from sana_sprint.noise import MAX_SEED, draw_noise, image_seeds, make_generators, system_seed


def test_seeds_count_up_from_one_number():
    assert image_seeds(7, 3) == [7, 8, 9]
    assert image_seeds([5, 1], 2) == [5, 1]
    assert image_seeds(MAX_SEED, 1) == [MAX_SEED]


def test_random_seeds_are_drawn_from_the_global_generator():
    torch.manual_seed(5)
    first, second = image_seeds(None, 2), image_seeds(None, 2)
    assert first != second  # equal once in 2**32 runs
    assert first == image_seeds(first[0], 2)
    torch.manual_seed(5)
    assert image_seeds(None, 2) == first


def test_seeds_of_the_system_do_not_follow_the_global_generator():
    """It is the same in each new process, where two runs of a command must differ."""
    seeds = []
    for _ in range(2):
        torch.manual_seed(5)
        seeds.append(system_seed())
    assert seeds[0] != seeds[1]  # equal once in 2**32 runs
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize(
    ("seed", "count", "message"),
    [
        ([1, 2], 3, r"one per image, 3 here; got: \[1, 2\]"),
        (-1, 1, "from 0 to .* got: -1"),
        (MAX_SEED, 2, f"got: {MAX_SEED + 1}"),
        (1.5, 1, "whole number, got: 1.5"),
        ("12", 2, "whole number, got: '1'"),
    ],
)
def test_bad_seeds_are_named(seed, count, message):
    with pytest.raises(ValueError, match=message):
        image_seeds(seed, count)


def test_an_images_noise_does_not_depend_on_its_batch():
    both = draw_noise((2, 3, 4, 4), make_generators([7, 8]))
    assert torch.equal(both[1:], draw_noise((1, 3, 4, 4), make_generators([8])))
    assert both.dtype == torch.float32


def test_one_generator_draws_the_batch_at_once():
    expected = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(7))
    assert torch.equal(draw_noise((2, 3, 4, 4), torch.Generator().manual_seed(7)), expected)
    torch.manual_seed(7)
    assert torch.equal(draw_noise((2, 3, 4, 4), None), expected)


def test_generators_must_match_the_batch():
    with pytest.raises(ValueError, match="one generator per image, 3 here; got: 2"):
        draw_noise((3, 1, 1, 1), make_generators([1, 2]))
