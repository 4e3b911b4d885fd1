"""The decoder's fast path against its plain path: pieces, strips, four-phase upsampling, and when each is taken."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana_sprint.models import frugal
from sana_sprint.models.dc_blocks import (
    EfficientViTBlock,
    GatedConv,
    MultiscaleLinearAttention,
    ResBlock,
    UpBlock,
    channels_to_space,
    repeat_channels,
)
from sana_sprint.models.derived import Derived
from sana_sprint.models.upsampling import phase_kernels
from tests.helpers.autoencoders import tiny_autoencoder
from tests.helpers.models import randomize

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "res": lambda: ResBlock(8, "rms_norm", "silu"),
    "res_other_activation": lambda: ResBlock(8, "rms_norm", "gelu"),
    "res_batch_norm": lambda: ResBlock(8, "batch_norm", "relu"),
    "gated": lambda: GatedConv(8),
    "attention": lambda: MultiscaleLinearAttention(8, 4, (3, 5), "rms_norm"),
    "vit": lambda: EfficientViTBlock(8, 4, (5,), "rms_norm"),
    "up_shuffle": lambda: UpBlock(8, 8, interpolate=False, shortcut=True),
    "up_1": lambda: UpBlock(8, 2, interpolate=True, shortcut=True),
    "up_2": lambda: UpBlock(8, 4, interpolate=True, shortcut=True),
    "up_4": lambda: UpBlock(8, 8, interpolate=True, shortcut=True),
    "up_6": lambda: UpBlock(4, 6, interpolate=True, shortcut=True),
    "up_8": lambda: UpBlock(4, 8, interpolate=True, shortcut=True),
    "up_alone": lambda: UpBlock(8, 3, interpolate=True, shortcut=False),
}
# fp32: sums in another order, 30 roundings at most of 6e-8. bf16: the plain path rounds each of its half dozen steps to
# 2^-8 of its size; the phases' kernels are rounded once more.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 4 * 2**-8}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces and strips of a few rows, as grids of a thousand pixels a side have."""
    monkeypatch.setattr(frugal, "PIECE", 60)
    monkeypatch.setattr(frugal, "STRIP", 700)


def make(name: str, dtype: torch.dtype) -> nn.Module:
    block = BLOCKS[name]()
    randomize(block, seed=3)
    return block.to(dtype).eval()


def grid(block: nn.Module, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    batch, height, width = shape
    channels = 4 if getattr(block, "repeats", 0) in (6, 8) else 8
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, height, width, generator=generator).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    error = (found - expected).norm() / expected.norm()
    assert error < TOLERANCE[found.dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 9, 7), (2, 5, 11), (1, 1, 1), (1, 2, 40), (1, 40, 1)])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_give_the_plain_numbers(name, shape, dtype, small_pieces):
    block = make(name, dtype)
    x = grid(block, shape, dtype)
    kept = x.clone()
    plain = block(x).detach()  # gradients enabled
    with torch.no_grad():
        found = block(x)
    assert_near(found, plain)
    assert torch.equal(x, kept)  # what a block is given is never written over
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["published", "skip_first", "batch_norm", "odd_shortcut_groups"])
def test_a_whole_decoder_gives_the_plain_numbers(name, small_pieces):
    model = tiny_autoencoder(name)
    latent = torch.randn(2, 4, 5, 3)
    plain = model.decode(latent).detach()
    with torch.inference_mode():
        assert_near(model.decode(latent), plain)


@pytest.mark.parametrize("strip", [1, 200, 1 << 24])
def test_strips_meet_without_seams(strip, monkeypatch):
    # One row at a time, some, all: the same convolution bit by bit in fp64, where the order of sums shows last.
    monkeypatch.setattr(frugal, "STRIP", strip)
    block = make("res", torch.float64)
    x = grid(block, (1, 12, 5), torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(block(x), block.requires_grad_()(x).detach(), rtol=1e-13, atol=1e-13)
        rows = frugal.by_strips(
            lambda strip, first, end, out: out.copy_(strip[:, :, first:end] * 2), x, 8, margin=1
        )
    assert torch.equal(rows, x * 2)
    covered = [row for first, end in frugal.strips(12, 60) for row in range(first, end)]
    assert covered == list(range(12))


@pytest.mark.parametrize("strip", [1, 200, 1 << 24])
@pytest.mark.parametrize(("name", "margin"), [("res", 2), ("gated", 1)])
def test_strips_may_write_over_what_they_read(name, margin, strip, monkeypatch):
    # Strips lower than the rows that the next one must still see, and higher ones; two pictures.
    monkeypatch.setattr(frugal, "STRIP", strip)
    block = make(name, torch.float64)
    x = grid(block, (2, 12, 5), torch.float64)
    with torch.no_grad():
        expected = frugal.by_strips(partial(rows_of, block), x, 8, margin=margin)
        found = frugal.by_strips(partial(rows_of, block), x, 8, margin=margin, may_overwrite=True)
    assert found is x
    assert torch.equal(found, expected)


def rows_of(block: nn.Module, strip: Tensor, first: int, end: int, out: Tensor) -> None:
    arguments = (False,) if isinstance(block, ResBlock) else ()
    block._rows(*arguments, strip, first, end, out)


def test_only_what_a_decoder_made_itself_is_written_over(small_pieces):
    model = tiny_autoencoder("published")
    latent = torch.randn(2, 4, 5, 3)
    kept, seen = latent.clone(), []
    for stage in model.decoder.up_blocks:
        stage[-1].register_forward_hook(
            lambda _, inputs, out: seen.append(out.data_ptr() == inputs[0].data_ptr())
        )
    with torch.no_grad():
        model.decode(latent)
    assert torch.equal(latent, kept)
    assert any(seen)


# --- When the fast path is taken ----------------------------------------------------------------------------------


def test_gradients_autocast_and_compilers_keep_the_plain_path():
    x = torch.zeros(1)
    assert not frugal.is_inference(x)
    with torch.no_grad():
        assert frugal.is_inference(x)
        assert frugal.is_frugal(x)
        assert not frugal.is_frugal(x.to("meta"))
        with torch.autocast("cpu", torch.bfloat16):
            assert not frugal.is_inference(x)
        compiled = torch.compile(
            lambda x: x + frugal.is_frugal(x) + 2 * frugal.is_inference(x), backend="eager"
        )
        assert compiled(x) == 2


# --- The phases' kernels ------------------------------------------------------------------------------------------


def test_phase_kernels_are_the_convolution_of_the_repeated_grid():
    weight, x = torch.randn(3, 2, 3, 3, dtype=torch.float64), torch.randn(1, 2, 4, 5, dtype=torch.float64)
    kernels = phase_kernels(weight)
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, padding=1)
    for phase in range(4):
        a, b = divmod(phase, 2)
        # The 2x2 window of phase (a,b) starts one pixel before the small one, less a and b.
        found = F.conv2d(F.pad(x, (1, 1, 1, 1)), kernels[phase * 3 : phase * 3 + 3])[
            :, :, a : a + 4, b : b + 5
        ]
        torch.testing.assert_close(found, expected[:, :, a::2, b::2], rtol=1e-13, atol=1e-13)


def test_phase_kernels_are_made_once_and_follow_the_weight():
    conv, cache = nn.Conv2d(2, 3, 3), Derived(phase_kernels)
    first = cache.of(conv)
    assert cache.of(conv) is first
    with torch.no_grad():
        conv.weight.mul_(2)
    assert torch.equal(cache.of(conv), 2 * first)
    conv.load_state_dict({"weight": torch.ones(3, 2, 3, 3), "bias": torch.zeros(3)})
    assert cache.of(conv).sum() == 3 * 2 * 36  # each tap of nine in four phases
    assert cache.of(conv.bfloat16()).dtype == torch.bfloat16
    conv.weight = nn.Parameter(torch.zeros(3, 2, 3, 3))
    assert not cache.of(conv).any()


def test_moved_copied_and_trained_blocks_leave_no_kernels_behind():
    block = UpBlock(8, 4, interpolate=True, shortcut=True)
    x = torch.randn(1, 8, 3, 3)

    def keeps(block: UpBlock) -> bool:
        return block.derived[0]._kept is not None

    with torch.no_grad():
        block(x)
        assert keeps(block)
        assert not keeps(copy.deepcopy(block))
        saved = io.BytesIO()
        torch.save(block, saved)
        saved.seek(0)
        assert not keeps(torch.load(saved, weights_only=False))
        block.to(torch.float64)
        assert not keeps(block)
        block.float()(x)
    block(x)  # with gradients: what follows may be an update that torch does not count
    assert not keeps(block)
    assert set(block.state_dict()) == {"conv.weight", "conv.bias"}


def test_the_kernels_take_part_only_where_they_are_right():
    # A convolution that was replaced, as quantisation does, is called as it is.
    block = UpBlock(8, 4, interpolate=True, shortcut=True)
    x = torch.randn(1, 8, 3, 3)
    with torch.no_grad():
        expected = block(x)
        block.conv = nn.Sequential(block.conv)
        torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)
        assert block.derived[0]._kept is None
        plain = block.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    assert torch.equal(block(x), plain + channels_to_space(repeat_channels(x, block.repeats)))


def test_a_compiler_sees_the_phases_and_gives_the_same():
    model = tiny_autoencoder("published")
    latent = torch.randn(1, 4, 3, 2)
    with torch.no_grad():
        expected = model.decode(latent)
        model.decoder.compile(backend="eager", fullgraph=True)  # one graph, or an error
        assert_near(model.decode(latent), expected)
