"""Convolutions by minimal filtering against direct ones, and where they are used."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sana_sprint import backends
from sana_sprint.backends.cpu import winograd
from sana_sprint.models.dc_blocks import ResBlock


@pytest.fixture
def small(monkeypatch):
    """Few channels and pixels are enough, and pieces are of few rows."""
    monkeypatch.setattr(winograd, "LEAST_CHANNELS", 4)
    monkeypatch.setattr(winograd, "LEAST_PIXELS", 16)
    monkeypatch.setattr(winograd, "PIECE", 1 << 13)


def picture(channels, height, width, dtype=torch.float32):
    return torch.randn(1, channels, height, width).to(dtype, memory_format=torch.channels_last)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("height", "width"), [(6, 8), (5, 7), (1, 1), (2, 3), (40, 6)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("small")
def test_it_is_the_convolution(dtype, height, width, has_bias):
    window = picture(5, height + 2, width, dtype)
    weight, bias = torch.randn(4, 5, 3, 3).to(dtype), torch.randn(4).to(dtype) if has_bias else None
    out = winograd.convolve(window, winograd.transformed_kernels(weight), bias)
    exact = (None if tensor is None else tensor.double() for tensor in (window, weight, bias))
    expected = F.conv2d(*exact, padding=(0, 1))
    error = (out.double() - expected).norm() / expected.norm()
    assert error < 8 * torch.finfo(dtype).eps / 2  # see the module: about four roundings
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
@pytest.mark.parametrize("strip", [1 << 24, 1 << 10])  # one strip, and several
@pytest.mark.usefixtures("small")
def test_a_block_uses_it_on_a_cpu_without_gradients(strip, monkeypatch):
    monkeypatch.setattr("sana_sprint.backends.cpu.strips.STRIP", strip)
    block, x = backends.apply(ResBlock(8, "rms_norm", "silu")), picture(8, 9, 6)
    calls = []
    convolve = winograd.convolve
    monkeypatch.setattr(winograd, "convolve", lambda *inputs: calls.append(0) or convolve(*inputs))
    found = block(x)
    assert calls
    expected = copy.deepcopy(block).double()(x.double())  # no products in fp64
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    assert all(conv in winograd.cached_kernels for conv in (block.conv1, block.conv2))
    block.to(torch.bfloat16)
    assert not any(conv in winograd.cached_kernels for conv in (block.conv1, block.conv2))
    calls.clear()
    with torch.enable_grad():
        block.float()(x)
    assert not calls


@torch.no_grad()
def test_where_it_pays(monkeypatch):
    monkeypatch.setattr(winograd, "_multiplies_bf16", lambda: False)
    many, few = winograd.LEAST_CHANNELS, winograd.LEAST_CHANNELS // 2

    def conv(inputs=many, outputs=many, size=3, **fields):
        return nn.Conv2d(inputs, outputs, size, **{"padding": 1, **fields}, device="meta")

    x = torch.empty(1, many, 64, 64)
    assert winograd.pays(conv(), x)
    for other in (conv(few), conv(size=5), conv(stride=2), conv(groups=2), conv(padding=0), nn.Identity()):
        assert not winograd.pays(other, x)
    assert not winograd.pays(conv(), x[:, :, :32])  # too few pixels
    assert not winograd.pays(conv(), x.double())
    assert not winograd.pays(conv(), x.bfloat16())
    monkeypatch.setattr(winograd, "_multiplies_bf16", lambda: True)
    assert winograd.pays(conv(), x.bfloat16())
    assert not winograd.pays(conv(), x.to("meta"))
