"""The default classes against the plain ones: pieces, strips, four-phase upsampling, and when each is used."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana_sprint import backends
from sana_sprint.backends.cpu import strips, subpixel
from sana_sprint.backends.cpu.subpixel import phase_kernels
from sana_sprint.backends.weight_cache import CachedFromWeight
from sana_sprint.models.dc_blocks import (
    DownBlock,
    EfficientViTBlock,
    GatedConv,
    MultiscaleLinearAttention,
    ResBlock,
    UpBlock,
    channels_to_space,
    repeat_channels,
)
from tests.helpers.autoencoders import tiny_autoencoder
from tests.helpers.models import TRANSFORMERS, randomize, tiny_transformer, transformer_inputs

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "res": lambda: ResBlock(8, "rms_norm", "silu"),
    "res_other_activation": lambda: ResBlock(8, "rms_norm", "gelu"),
    "res_batch_norm": lambda: ResBlock(8, "batch_norm", "relu"),
    "gated": lambda: GatedConv(8),
    "attention": lambda: MultiscaleLinearAttention(8, 4, (3, 5), "rms_norm"),
    "vit": lambda: EfficientViTBlock(8, 4, (5,), "rms_norm"),
    "down_conv_1": lambda: DownBlock(8, 8, unshuffle=False, shortcut=True),
    "down_conv_2": lambda: DownBlock(8, 16, unshuffle=False, shortcut=True),
    "down_shuffle_4": lambda: DownBlock(8, 32, unshuffle=True, shortcut=True),
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
    monkeypatch.setattr(strips, "PIECE", 60)
    monkeypatch.setattr(strips, "STRIP", 700)


def make(name: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A plain block, and one of the same weights with the default classes."""
    block = BLOCKS[name]()
    randomize(block, seed=3)
    block = block.to(dtype).eval()
    return block, backends.apply(copy.deepcopy(block))


def grid(block: nn.Module, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    batch, height, width = shape
    if isinstance(block, DownBlock):
        height, width = 2 * height, 2 * width
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
    plain, fast = make(name, dtype)
    x = grid(plain, shape, dtype)
    kept = x.clone()
    expected = plain(x).detach()
    with torch.no_grad():
        found = fast(x)
    assert_near(found, expected)
    assert_near(fast(x).detach(), expected)  # with gradients
    assert torch.equal(x, kept)  # what a block is given is never written over
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["published", "skip_first", "batch_norm", "odd_shortcut_groups"])
def test_a_whole_decoder_gives_the_plain_numbers(name, small_pieces):
    model = tiny_autoencoder(name)
    latent = torch.randn(2, 4, 5, 3)
    plain = model.decode(latent).detach()
    backends.apply(model)
    with torch.inference_mode():
        assert_near(model.decode(latent), plain)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_whole_transformer_gives_the_plain_numbers(name, small_pieces):
    model = tiny_transformer(name)
    inputs = transformer_inputs(model.config)
    guidance = inputs["guidance"] if model.config.guidance_embeds else None

    def velocity() -> Tensor:
        context = model.encode_caption(inputs["text"], inputs["text_mask"])
        return model(inputs["latent"], inputs["timestep"], context, guidance).detach()

    plain = velocity()
    backends.apply(model)
    with torch.no_grad():
        assert_near(velocity(), plain)
    assert torch.equal(velocity(), plain)  # with gradients, the plain operations


@pytest.mark.parametrize("strip", [1, 200, 1 << 24])
def test_strips_meet_without_seams(strip, monkeypatch):
    # One row at a time, some, all: the same convolution bit by bit in fp64, where the order of sums shows last.
    monkeypatch.setattr(strips, "STRIP", strip)
    plain, fast = make("res", torch.float64)
    x = grid(plain, (1, 12, 5), torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-13, atol=1e-13)
        rows = strips.by_strips(
            lambda strip, first, end, out: out.copy_(strip[:, :, first:end] * 2), x, 8, margin=1
        )
    assert torch.equal(rows, x * 2)
    covered = [row for first, end in strips.strips(12, 60) for row in range(first, end)]
    assert covered == list(range(12))


@pytest.mark.parametrize("strip", [1, 200, 1 << 24])
@pytest.mark.parametrize("margin", [1, 2])
def test_strips_may_write_over_what_they_read(margin, strip, monkeypatch):
    # Strips lower than the rows that the next one must still see, and higher ones; two pictures.
    monkeypatch.setattr(strips, "STRIP", strip)
    conv = nn.Conv2d(8, 8, 3, padding=1).double()
    x = grid(conv, (2, 12, 5), torch.float64)

    def rows(window: Tensor, first: int, end: int, out: Tensor) -> None:
        if margin == 2:
            top = max(0, first - 1)
            window = strips.convolve_rows(conv, window, top, min(end + 1, window.shape[2]))
            first, end = first - top, end - top
        out.copy_(strips.convolve_rows(conv, window, first, end))

    with torch.no_grad():
        expected = conv(conv(x)) if margin == 2 else conv(x)
        apart = strips.by_strips(rows, x, 8, margin=margin)
        found = strips.by_strips(rows, x, 8, margin=margin, may_overwrite=True)
    assert found is x
    assert torch.equal(found, apart)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_only_what_a_decoder_made_itself_is_written_over(small_pieces):
    model = backends.apply(tiny_autoencoder("published"))
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
    assert not strips.is_inference(x)
    with torch.no_grad():
        assert strips.is_inference(x)
        assert strips.is_cpu_inference(x)
        assert not strips.is_cpu_inference(x.to("meta"))
        with torch.autocast("cpu", torch.bfloat16):
            assert not strips.is_inference(x)
        compiled = torch.compile(
            lambda x: x + strips.is_cpu_inference(x) + 2 * strips.is_inference(x), backend="eager"
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
    conv, cache = nn.Conv2d(2, 3, 3), CachedFromWeight(phase_kernels)
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
    block = backends.apply(UpBlock(8, 4, interpolate=True, shortcut=True))
    x = torch.randn(1, 8, 3, 3)

    def keeps(block: UpBlock) -> bool:
        return block.conv in subpixel.cached_kernels

    with torch.no_grad():
        expected = block(x)
        assert keeps(block)
        copied = copy.deepcopy(block)
        saved = io.BytesIO()
        torch.save(block, saved)
        saved.seek(0)
        loaded = torch.load(saved, weights_only=False)
        for other in (copied, loaded):
            assert not keeps(other)
            assert torch.equal(other(x), expected)
        block.to(torch.float64)
        assert not keeps(block)
        block.float()(x)
        assert keeps(block)
        backends.remove(block)
        assert not keeps(block)
        backends.apply(block)(x)
    block(x)  # with gradients: what follows may be an update that torch does not count
    assert not keeps(block)
    assert set(block.state_dict()) == {"conv.weight", "conv.bias"}


def test_the_kernels_take_part_only_where_they_are_right():
    # A convolution that was replaced is called as it is.
    block = backends.apply(UpBlock(8, 4, interpolate=True, shortcut=True))
    x = torch.randn(1, 8, 3, 3)
    with torch.no_grad():
        expected = block(x)
        block.conv = nn.Sequential(block.conv)
        torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)
        plain = block.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    assert torch.equal(block(x), plain + channels_to_space(repeat_channels(x, block.repeats)))


def test_a_compiler_sees_the_phases_and_gives_the_same():
    model = backends.apply(tiny_autoencoder("published"))
    latent = torch.randn(1, 4, 3, 2)
    with torch.no_grad():
        expected = model.decode(latent)
        model.decoder.compile(backend="eager", fullgraph=True)  # one graph, or an error
        assert_near(model.decode(latent), expected)
