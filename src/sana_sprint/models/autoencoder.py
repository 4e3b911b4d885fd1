"""The deep-compression autoencoder (DC-AE) of SANA: pictures to latents of few tokens and back.

Attribute names are the published checkpoint keys. Encoder and decoder are stages of blocks, one stage per
grid size; stage 0 is the full picture. A stage 0 with no layers is skipped: its convolution then changes
the grid as well. Tiling for big pictures is in `tiling.py`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from sana_sprint.models.dc_blocks import (
    ChannelRMSNorm,
    DownBlock,
    EfficientViTBlock,
    ResBlock,
    UpBlock,
    make_activation,
)


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Fields of the published config.json; per-stage tuples run from the full picture to the latent."""

    in_channels: int = 3
    latent_channels: int = 32
    attention_head_dim: int = 32
    encoder_block_types: str | tuple[str, ...] = "ResBlock"
    decoder_block_types: str | tuple[str, ...] = "ResBlock"
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    upsample_block_type: str = "pixel_shuffle"
    downsample_block_type: str = "pixel_unshuffle"
    decoder_norm_types: str | tuple[str, ...] = "rms_norm"
    decoder_act_fns: str | tuple[str, ...] = "silu"
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    decoder_conv_act_fn: str = "relu"
    scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        num_stages = len(self.encoder_block_out_channels)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple) and len(value) != num_stages:
                raise ValueError(f"{field.name} must have {num_stages} entries, one per stage; got {value}")
        _check_choice("upsample_block_type", self.upsample_block_type, ("interpolate", "pixel_shuffle"))
        _check_choice("downsample_block_type", self.downsample_block_type, ("conv", "pixel_unshuffle"))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AutoencoderConfig:
        """Reads a config.json's content; keys starting with "_" are notes. Unknown keys raise ValueError."""
        known = {field.name for field in fields(cls)}
        given = {key: _as_tuple(value) for key, value in values.items() if not key.startswith("_")}
        unknown = sorted(given.keys() - known)
        if unknown:
            raise ValueError(f"unknown autoencoder config fields: {', '.join(unknown)}")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The content for a config.json."""
        return asdict(self)


class AutoencoderDC(nn.Module):
    """Encoder and decoder. Latents here are raw: callers multiply by `config.scaling_factor`.

    Pictures are (B,3,H,W) in [-1,1] with H and W divisible by `spatial_compression_ratio`; latents are
    (B,latent_channels,H/ratio,W/ratio).
    """

    config_class = AutoencoderConfig
    published_class_name = "AutoencoderDC"

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.spatial_compression_ratio = 2 ** (len(config.encoder_block_out_channels) - 1)

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The weights' device."""
        return next(self.parameters()).device

    def encode(self, image: Tensor) -> Tensor:
        """Picture (B,3,H,W) in [-1,1] -> raw latent (B,C,h,w). Deterministic."""
        latent: Tensor = self.encoder(image)
        return latent

    def decode(self, latent: Tensor) -> Tensor:
        """Raw latent (B,C,h,w) -> picture (B,3,H,W), about [-1,1] and not clamped."""
        image: Tensor = self.decoder(latent)
        return image


class Encoder(nn.Module):
    """Picture -> raw latent."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels, layers = config.encoder_block_out_channels, config.encoder_layers_per_block
        unshuffle = config.downsample_block_type == "pixel_unshuffle"
        self.conv_in: nn.Module
        if layers[0] > 0:
            self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        else:
            self.conv_in = DownBlock(config.in_channels, channels[1], unshuffle=unshuffle, shortcut=False)
        types = _per_stage(config.encoder_block_types, len(channels))
        stages = []
        for i, count in enumerate(layers):
            blocks = [
                _make_block(
                    types[i], channels[i], config, config.encoder_qkv_multiscales[i], "rms_norm", "silu"
                )
                for _ in range(count)
            ]
            if count > 0 and i + 1 < len(channels):
                blocks.append(DownBlock(channels[i], channels[i + 1], unshuffle=unshuffle, shortcut=True))
            stages.append(nn.Sequential(*blocks))
        self.down_blocks = nn.ModuleList(stages)
        self.conv_out = nn.Conv2d(channels[-1], config.latent_channels, 3, padding=1)
        self.latent_channels = config.latent_channels
        self.out_shortcut = config.encoder_out_shortcut

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for stage in self.down_blocks:
            x = stage(x)
        latent: Tensor = self.conv_out(x)
        if self.out_shortcut:
            latent = latent + x.unflatten(1, (self.latent_channels, -1)).mean(dim=2)
        return latent


class Decoder(nn.Module):
    """Raw latent -> picture."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels, layers = config.decoder_block_out_channels, config.decoder_layers_per_block
        interpolate = config.upsample_block_type == "interpolate"
        self.conv_in = nn.Conv2d(config.latent_channels, channels[-1], 3, padding=1)
        self.in_shortcut = config.decoder_in_shortcut
        self.in_repeats = channels[-1] // config.latent_channels
        types = _per_stage(config.decoder_block_types, len(channels))
        norms = _per_stage(config.decoder_norm_types, len(channels))
        activations = _per_stage(config.decoder_act_fns, len(channels))
        stages = []
        for i, count in enumerate(layers):
            blocks: list[nn.Module] = []
            if count > 0 and i + 1 < len(channels):
                blocks.append(UpBlock(channels[i + 1], channels[i], interpolate=interpolate, shortcut=True))
            scales = config.decoder_qkv_multiscales[i]
            blocks += [
                _make_block(types[i], channels[i], config, scales, norms[i], activations[i])
                for _ in range(count)
            ]
            stages.append(nn.Sequential(*blocks))
        self.up_blocks = nn.ModuleList(stages)  # stage 0 is the full picture, so it runs last
        width = channels[0] if layers[0] > 0 else channels[1]
        self.norm_out = ChannelRMSNorm(width)
        self.conv_act = make_activation(config.decoder_conv_act_fn)
        self.conv_out: nn.Module
        if layers[0] > 0:
            self.conv_out = nn.Conv2d(width, config.in_channels, 3, padding=1)
        else:
            self.conv_out = UpBlock(width, config.in_channels, interpolate=interpolate, shortcut=False)

    def forward(self, latent: Tensor) -> Tensor:
        x = self.conv_in(latent)
        if self.in_shortcut:
            x = x + latent.repeat_interleave(self.in_repeats, dim=1)
        for stage in reversed(self.up_blocks):
            x = stage(x)
        image: Tensor = self.conv_out(self.conv_act(self.norm_out(x)))
        return image


def _make_block(
    kind: str, channels: int, config: AutoencoderConfig, scales: tuple[int, ...], norm: str, activation: str
) -> nn.Module:
    if kind == "ResBlock":
        return ResBlock(channels, norm, activation)
    if kind == "EfficientViTBlock":
        return EfficientViTBlock(channels, config.attention_head_dim, scales, norm)
    raise ValueError(f"unknown autoencoder block {kind!r}; allowed: EfficientViTBlock, ResBlock")


def _per_stage(value: str | tuple[str, ...], num_stages: int) -> tuple[str, ...]:
    return (value,) * num_stages if isinstance(value, str) else value


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list | tuple) else value


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value.lower() not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
