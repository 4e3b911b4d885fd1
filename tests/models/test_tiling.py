"""Tiles: where they lie, how they are blended, and that no seam is left."""

from __future__ import annotations

import math
import weakref
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from sana_sprint.models.autoencoder import AutoencoderDC
from sana_sprint.models.tiling import Tiling, feather, run_tiled, tile_starts
from tests.helpers.autoencoders import autoencoder_config, tiny_autoencoder


@st.composite
def axes(draw: st.DrawFn) -> tuple[int, int, int]:
    """Cells of a picture, of a tile no larger, and of the overlap."""
    tile = draw(st.integers(1, 12))
    return draw(st.integers(tile, 40)), tile, draw(st.integers(0, tile - 1))


@given(axis=axes())
@settings(deadline=None)
def test_tiles_cover_the_axis_from_edge_to_edge(axis):
    size, tile, overlap = axis
    starts = tile_starts(size, tile, overlap)
    assert starts[0] == 0
    assert starts[-1] + tile == size
    steps = [after - before for before, after in pairwise(starts)]
    assert all(1 <= step <= tile - overlap for step in steps)
    assert max(steps, default=0) - min(steps, default=0) <= 1
    assert (
        len(starts) == 1 or tile + (len(starts) - 2) * (tile - overlap) < size
    )  # one tile less would not do


@given(axis=axes(), step=st.integers(1, 4))
@settings(deadline=None)
def test_weights_are_positive_and_add_up_to_one(axis, step):
    size, tile, overlap = axis
    starts = tile_starts(size, tile, overlap)
    weights = feather(starts, tile, step)
    assert weights.shape == (len(starts), tile * step)
    assert weights.min() > 0
    total = torch.zeros(size * step, dtype=torch.float64)
    for start, weight in zip(starts, weights, strict=True):
        total[start * step : (start + tile) * step] += weight
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)  # fp64 rounding


def test_weights_fall_only_where_tiles_overlap():
    left, right = feather(tile_starts(12, 8, 4), 8, 3)
    assert (left[:12] == 1).all()
    assert (right[12:] == 1).all()
    assert (left[12:].diff() < 0).all()
    torch.testing.assert_close(left.flip(0), right)
    # A tile's border pixel is half a pixel into an overlap of 12: sin^2 of 1/24 of a quarter turn.
    torch.testing.assert_close(right[0].item(), math.sin(math.pi / 48) ** 2)


class _Enlarge(nn.Module):
    """Each pixel becomes a square of them."""

    def __init__(self, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(x, scale_factor=float(self.ratio), mode="nearest")


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, int], Tiling]:
    """A grid of any size and any tiling, also with tiles larger than the grid."""
    tile = (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    overlap = (draw(st.integers(0, tile[0] - 1)), draw(st.integers(0, tile[1] - 1)))
    grid = (draw(st.integers(1, 20)), draw(st.integers(1, 20)))
    return grid, Tiling(tile=tile, overlap=overlap)


@given(case=tilings(), ratio=st.sampled_from([1, 2, 4]))
@example(
    case=((3, 25), Tiling(tile=(8, 8), overlap=(3, 3))), ratio=1
)  # one row of tiles, as high as the overlap
@settings(max_examples=60, deadline=None)
def test_an_identity_gives_the_input_back(case, ratio):
    grid, tiling = case
    latent = torch.rand(2, 3, *grid) + 1
    image = nn.functional.interpolate(latent, scale_factor=float(ratio), mode="nearest")
    decoded = run_tiled(_Enlarge(ratio), latent, tiling, in_step=1, out_step=ratio)
    encoded = run_tiled(nn.AvgPool2d(ratio), image, tiling, in_step=ratio, out_step=1)
    # Weights of up to 4 x 4 tiles and more, each rounded to fp32 once, and as many fp32 additions.
    torch.testing.assert_close(decoded, image, rtol=1e-5, atol=0)
    torch.testing.assert_close(encoded, latent, rtol=1e-5, atol=0)


def test_tiles_are_of_full_size_and_released():
    shapes, alive = set(), []

    def network(x: torch.Tensor) -> torch.Tensor:
        assert sum(tile() is not None for tile in alive) <= 1  # at most the one just added
        shapes.add(tuple(x.shape[2:]))
        out = x * 2
        alive.append(weakref.ref(out))
        return out

    x = torch.rand(1, 3, 19, 26)
    out = run_tiled(network, x, Tiling(tile=(8, 7), overlap=(2, 3)), in_step=1, out_step=1)
    torch.testing.assert_close(out, 2 * x)
    assert shapes == {(8, 7)}
    assert len(alive) == 3 * 6


# --- Through the model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(5, 4), (8, 8), (1, 8)])
@torch.no_grad()
def test_pictures_within_a_tile_are_exactly_the_untiled_ones(grid):
    model = tiny_autoencoder("published")
    latent = torch.randn(2, 4, *grid)
    image = torch.rand(2, 3, 4 * grid[0], 4 * grid[1])
    expected = model.decode(latent), model.encode(image)
    model.enable_tiling(32, 8)
    assert torch.equal(model.decode(latent), expected[0])
    assert torch.equal(model.encode(image), expected[1])


@pytest.mark.parametrize("grid", [(9, 8), (8, 9), (13, 17), (3, 25), (40, 1)])
@torch.no_grad()
def test_sizes_and_dtypes(grid):
    model = tiny_autoencoder("published").bfloat16()
    model.enable_tiling(32, 12)
    image = model.decode(torch.randn(2, 4, *grid).bfloat16())
    assert image.shape == (2, 3, 4 * grid[0], 4 * grid[1])
    assert model.encode(image).shape == (2, 4, *grid)
    assert image.dtype == torch.bfloat16


@torch.no_grad()
def test_disable_tiling():
    model = tiny_autoencoder("published")
    latent = torch.randn(1, 4, 12, 12)
    expected = model.decode(latent)
    model.enable_tiling(32)
    assert not torch.equal(model.decode(latent), expected)
    model.disable_tiling()
    assert torch.equal(model.decode(latent), expected)


@torch.no_grad()
def test_slicing_within_tiling():
    model = tiny_autoencoder("published")
    latent = torch.randn(3, 4, 12, 10)
    model.enable_tiling(32)
    expected = model.decode(latent)
    model.enable_slicing()
    # The same sums over other batch sizes, so only fp32 rounding differs.
    torch.testing.assert_close(model.decode(latent), expected, rtol=1e-4, atol=1e-4)


def _jumps(image: torch.Tensor, borders: list[int]) -> tuple[float, float]:
    """Largest step between columns at the borders, and elsewhere; 40 pixels of the picture's own edges left out."""
    steps = image.diff(dim=-1).abs().amax(dim=(0, 1, 2))
    at_border = torch.zeros_like(steps, dtype=torch.bool)
    at_border[[border - 1 for border in borders]] = True
    inner = torch.zeros_like(at_border)
    inner[40:-40] = True
    return steps[at_border].max().item(), steps[inner & ~at_border].max().item()


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_no_seam_in_a_constant_latent(seed):
    # Interpolation, so that a random decoder's picture of a constant is itself constant away from the edges.
    model = tiny_autoencoder(
        "published",
        seed,
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_layers_per_block=(1, 1, 1),
        decoder_qkv_multiscales=((), (), (3,)),
    )
    latent = torch.full((1, 4, 8, 60), 0.5)

    def jumps(tile: int, overlap: int, borders: list[int]) -> tuple[float, float]:
        model.enable_tiling(4 * tile, 4 * overlap)
        return _jumps(model.decode(latent), [4 * border for border in borders])

    hard_border, _ = jumps(20, 0, [20, 40])
    border, elsewhere = jumps(28, 12, [16, 28, 32, 44])
    assert border <= elsewhere
    # What is left of the tiles' edges is spread over the overlap (48 pixels): each step a small part of the seam.
    assert max(border, elsewhere) < 0.15 * hard_border


def test_a_difference_in_tone_is_spread_over_the_overlap():
    # Stands for global attention: the whole tile takes on a tone that depends on what is in it.
    tones = iter([0.0, 1.0])
    out = run_tiled(
        lambda x: x + next(tones),
        torch.zeros(1, 1, 4, 24),
        Tiling(tile=(4, 16), overlap=(4 - 1, 8)),
        in_step=1,
        out_step=1,
    )
    steps = out.diff(dim=-1)
    assert (out[..., :8] == 0).all()
    assert (out[..., 16:] == 1).all()
    assert steps.min() >= 0
    assert steps.max() < math.pi / 2 / 8  # a raised cosine is steepest in its middle, by pi/2


def test_gradients_pass_through_tiles():
    model = tiny_autoencoder("published").double()
    model.enable_tiling(32, 8)
    latent = torch.randn(1, 4, 3, 10, dtype=torch.float64)
    direction = torch.randn_like(latent)
    image, tangent = torch.func.jvp(model.decode, (latent,), (direction,))
    weights = torch.randn_like(image)
    leaf = latent.clone().requires_grad_()
    (model.decode(leaf) * weights).sum().backward()
    # Forward and reverse mode are independent ways to the same number.
    torch.testing.assert_close((leaf.grad * direction).sum(), (tangent * weights).sum())


# --- Settings -----------------------------------------------------------------------------------------------------


def test_default_tile():
    model = tiny_autoencoder()
    assert model.tiling is None
    model.enable_tiling()
    assert model.tiling == Tiling(tile=(256, 256), overlap=(64, 64))  # 1024 and 256 pixels, 4 a cell
    model.enable_tiling(40)
    assert model.tiling == Tiling(tile=(10, 10), overlap=(2, 2))  # a quarter, in whole cells


def test_published_arguments():
    model = tiny_autoencoder()
    model.enable_tiling(tile_sample_min_height=64, tile_sample_min_width=96, tile_sample_stride_width=72.0)
    assert model.tiling == Tiling(tile=(16, 24), overlap=(4, 6))
    model.enable_tiling(
        tile_sample_min_height=64,
        tile_sample_min_width=64,
        tile_sample_stride_height=56,
        tile_sample_stride_width=60,
    )
    assert model.tiling == Tiling(tile=(16, 16), overlap=(2, 1))
    model.enable_tiling(tile_sample_min_width=64, overlap=32)
    assert model.tiling == Tiling(tile=(256, 16), overlap=(8, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile_size": 30}, "tile height must be a positive multiple of 4 pixels; got 30"),
        ({"tile_size": 0}, "tile height must be a positive multiple of 4 pixels; got 0"),
        ({"tile_size": -8}, "tile height must be a positive multiple of 4 pixels; got -8"),
        ({"tile_sample_min_height": 0}, "tile height must be a positive multiple of 4 pixels; got 0"),
        ({"tile_sample_min_width": 2}, "tile width must be a positive multiple of 4 pixels; got 2"),
        ({"tile_size": 32, "overlap": 32}, "multiple of 4 from 0 to 28 pixels.*got 32"),
        ({"tile_size": 32, "overlap": -4}, "multiple of 4 from 0 to 28 pixels.*got -4"),
        ({"tile_size": 32, "overlap": 6}, "multiple of 4 from 0 to 28 pixels.*got 6"),
        ({"tile_size": 32, "tile_sample_stride_width": 40}, "overlap along the width.*got -8"),
        ({"tile_size": 32, "tile_sample_stride_height": 0}, "overlap along the height.*got 32"),
    ],
)
def test_bad_settings_are_refused_and_change_nothing(arguments, message):
    model = AutoencoderDC(autoencoder_config())
    with pytest.raises(ValueError, match=message):
        model.enable_tiling(**arguments)
    assert model.tiling is None
