"""Our autoencoder against diffusers' AutoencoderDC: same keys, same numbers, the same config.json."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderDC as PublishedAutoencoder
from diffusers.models import activations

from sana_sprint.models.autoencoder import AutoencoderConfig, AutoencoderDC
from tests.helpers.autoencoders import (
    AUTOENCODERS,
    PUBLISHED_AUTOENCODER,
    PUBLISHED_PARAMETERS,
    autoencoder_config,
    tiny_autoencoder,
)

# Height and width in latent cells: odd ratios, single rows and columns, and few enough cells for the published
# code's quadratic attention where a head has 16 channels.
GRIDS = [(3, 5), (1, 7), (6, 1), (9, 4)]


@pytest.fixture(autouse=True)
def relu6_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    # The original DC-AE's activation. diffusers' blocks can hold it but its table of names lacks it.
    monkeypatch.setitem(activations.ACT2CLS, "relu6", torch.nn.ReLU6)


def published(config: AutoencoderConfig) -> PublishedAutoencoder:
    return PublishedAutoencoder.from_config(config.to_dict()).eval()


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    # fp32 sums in another order; 1e-4 of the signal is far below what any wrong term would make.
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-4 * theirs.square().mean().sqrt()


def layout(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", AUTOENCODERS)
@torch.no_grad()
def test_same_keys_and_numbers(name):
    ours = tiny_autoencoder(name)
    theirs = published(ours.config)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    again = AutoencoderDC(ours.config)
    again.load_state_dict(theirs.state_dict(), strict=True)
    again.eval()
    ratio = ours.spatial_compression_ratio
    assert ratio == theirs.spatial_compression_ratio
    for height, width in GRIDS:
        image = torch.rand(2, ours.config.in_channels, height * ratio, width * ratio) * 2 - 1
        latent = torch.randn(2, ours.config.latent_channels, height, width)
        assert_close(again.encode(image), theirs.encode(image, return_dict=False)[0])
        assert_close(again.decode(latent), theirs.decode(latent, return_dict=False)[0])


def test_published_sizes():
    config = AutoencoderConfig.from_dict(PUBLISHED_AUTOENCODER)
    with torch.device("meta"):
        ours, theirs = AutoencoderDC(config), PublishedAutoencoder.from_config(PUBLISHED_AUTOENCODER)
    assert layout(ours) == layout(theirs)
    assert sum(parameter.numel() for parameter in ours.parameters()) == PUBLISHED_PARAMETERS
    assert ours.spatial_compression_ratio == 32


def test_default_config_is_the_published_one():
    with torch.device("meta"):
        ours, theirs = AutoencoderDC(AutoencoderConfig()), PublishedAutoencoder()
    assert layout(ours) == layout(theirs)
    assert AutoencoderConfig.from_dict(dict(theirs.config)) == AutoencoderConfig()


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_configs_pass_through_config_json_both_ways(name):
    config = autoencoder_config(name)
    theirs = published(config)
    written = json.loads(theirs.to_json_string())
    assert written["_class_name"] == AutoencoderDC.published_class_name
    assert AutoencoderConfig.from_dict(written) == config


@torch.no_grad()
def test_half_precision_is_no_farther_from_fp32_than_the_published_code():
    ours = tiny_autoencoder("published")
    theirs = published(ours.config)
    theirs.load_state_dict(ours.state_dict())
    latent = torch.randn(32, ours.config.latent_channels, 6, 5)
    exact = ours.decode(latent)
    ours.bfloat16()
    theirs.bfloat16()

    def error(image: torch.Tensor) -> torch.Tensor:
        # The median picture: random weights make a few attention sums nearly zero, which magnifies any rounding.
        return (image.float() - exact).square().mean(dim=(1, 2, 3)).sqrt().median()

    ours_error = error(ours.decode(latent.bfloat16()))
    theirs_error = error(theirs.decode(latent.bfloat16(), return_dict=False)[0])
    assert 0 < ours_error < 1.2 * theirs_error  # roundings fall differently, so a little to either side
