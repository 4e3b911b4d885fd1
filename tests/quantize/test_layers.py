"""Quantised layers against the products of the rounded numbers."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sana_sprint.backends.cpu.strips import convolve_rows
from sana_sprint.backends.cpu.subpixel import phase_convolution, upsample
from sana_sprint.models.dc_blocks import UpBlock, channels_to_space, repeat_channels
from sana_sprint.quantize.formats import decode, encode
from sana_sprint.quantize.layers import QuantizedConv2d, QuantizedLinear, QuantizedPhases, QuantizedUpBlock
from sana_sprint.quantize.matmul import int8_rows
from sana_sprint.quantize.models import quantize_model
from tests.helpers.autoencoders import tiny_autoencoder
from tests.helpers.quantize import ON_CPU, needs_vnni, relative


@needs_vnni
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_the_product_of_the_rounded_numbers(dtype):
    torch.manual_seed(0)
    layer = nn.Linear(64, 40).to(dtype)
    quantized = QuantizedLinear.of(layer, "int8")
    x = torch.randn(3, 7, 64).to(dtype)
    step = x.float().abs().amax(-1, keepdim=True) / 127
    if dtype == torch.bfloat16:  # steps are numbers that it can hold
        step = torch.where(step.bfloat16() < step, (step * (1 + 2**-8)).bfloat16(), step.bfloat16()).float()
    expected = F.linear((x.float() / step).round() * step, quantized.weight.float(), layer.bias.float())
    # The sums are whole numbers and exact: what is left is the rounding of the result, twice in bf16.
    assert relative(quantized(x), expected) < (1e-6 if dtype == torch.float32 else 5e-3)
    assert quantized(x).dtype == dtype


def test_the_other_int8_kernel_agrees_with_the_rounded_product():
    torch.manual_seed(0)
    codes, scale = encode(torch.randn(40, 64), "int8")
    x = torch.randn(5, 64)  # fewer rows than the kernel takes: they are filled up
    step = x.abs().amax(-1, keepdim=True) / 127
    expected = ((x / step).round() * step) @ decode(codes, scale, "int8").T
    # Whole numbers again; fp32 rounding of the two scales.
    torch.testing.assert_close(int8_rows(x, codes, None, scale.flatten()), expected, rtol=1e-5, atol=1e-5)


@needs_vnni
def test_strips_of_an_int8_convolution():
    """A strip has a scale of its own; of the whole picture it is the picture's."""
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 24, 3, padding=1)
    quantized = QuantizedConv2d.of(layer, "int8")
    x = torch.randn(1, 16, 10, 12)
    assert torch.equal(convolve_rows(quantized, x, 0, 10), quantized(x))
    strip = convolve_rows(quantized, x, 3, 7)
    assert strip.shape == (1, 24, 4, 12)
    assert relative(strip, layer(x)[:, :, 3:7]) < 0.02
    assert torch.equal(quantized(x), quantized(x))  # with the codes that strips were given


@needs_vnni
def test_rows_are_rounded_alike_in_any_number_of_pieces(monkeypatch):
    torch.manual_seed(0)
    layer = QuantizedLinear.of(nn.Linear(64, 40), "int8")
    x = torch.randn(9, 64)
    whole = layer(x)
    monkeypatch.setattr("sana_sprint.backends.cpu.strips.PIECE", 130)  # two rows
    assert torch.equal(layer(x), whole)


def upblocks(model: nn.Module) -> list[UpBlock]:
    return [module for module in model.decoder.modules() if isinstance(module, UpBlock)]


def test_upsampling_stays_as_it_is_where_only_weights_are_rounded():
    model = tiny_autoencoder("published")
    quantize_model(model, "vae", "int8-weights")
    assert upblocks(model)
    assert all(isinstance(block.conv, nn.Conv2d) for block in upblocks(model))


@needs_vnni
@pytest.mark.parametrize("shortcut", [False, True])
def test_int8_upsampling_is_that_of_the_rounded_numbers(shortcut):
    torch.manual_seed(0)
    block = UpBlock(16, 8, interpolate=True, shortcut=shortcut)
    x = torch.randn(2, 16, 5, 7)
    x[1] *= 30
    step = x.abs().amax((1, 2, 3), keepdim=True) / 127
    with torch.no_grad():
        plain = block(x)
        block.__class__ = QuantizedUpBlock
        block.conv = quantized = QuantizedPhases.of(phase_convolution(block.conv), "int8")
        convolve = partial(F.conv2d, weight=quantized.weight, bias=quantized.bias, padding=(0, 1))
        expected = upsample((x / step).round() * step, convolve, 8, None)
        if shortcut:
            expected += channels_to_space(repeat_channels(x, block.repeats))
        found = block(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)  # exact sums, fp32 scales
    assert relative(found, plain) < 0.02


@needs_vnni
@pytest.mark.parametrize("stride", [1, 2])
def test_int8_convolution_is_the_convolution_of_the_rounded_numbers(stride):
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 24, 3, padding=1, stride=stride)
    quantized = QuantizedConv2d.of(layer, "int8")
    x = torch.randn(2, 16, 10, 12)
    x[1] *= 30
    step = x.abs().amax((1, 2, 3), keepdim=True) / 127
    expected = F.conv2d((x / step).round() * step, quantized.weight, layer.bias, stride=stride, padding=1)
    torch.testing.assert_close(quantized(x), expected, rtol=1e-5, atol=1e-4)  # exact sums, fp32 scales


@pytest.mark.parametrize("preset", ON_CPU)
def test_a_row_and_a_picture_do_not_depend_on_their_neighbours(preset):
    torch.manual_seed(0)
    linear = QuantizedLinear.of(nn.Linear(64, 32).bfloat16(), preset)
    convolution = QuantizedConv2d.of(nn.Conv2d(16, 16, 3, padding=1).bfloat16(), preset)
    for layer, x in ((linear, torch.randn(4, 9, 64)), (convolution, torch.randn(4, 16, 8, 8))):
        x = (x * torch.tensor([1.0, 100.0, 0.01, 1.0]).view(-1, *[1] * (x.ndim - 1))).bfloat16()
        # Other sizes may sum in another order; a scale over the batch would cost the small picture everything.
        assert relative(layer(x)[2:3], layer(x[2:3])) < 5e-3
