"""The deep-compression autoencoder (DC-AE) of SANA: pictures to latents of few tokens and back.

Attribute names are the published checkpoint keys. Encoder and decoder are stages of blocks, one stage per
grid size; stage 0 is the full picture. A stage 0 with no layers is skipped: its convolution then changes
the grid as well. Tiling for big pictures is in `tiling.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from sana_sprint.config import Config, check_choice
from sana_sprint.stopping import ShouldStop, stop_if

from .dc_blocks import (
    ACTIVATIONS,
    NORMS,
    ChannelRMSNorm,
    DownBlock,
    EfficientViTBlock,
    ResBlock,
    Stage,
    UpBlock,
    average_channels,
    repeat_channels,
)
from .tiling import Tiling, run_tiled

_BLOCKS = ("EfficientViTBlock", "ResBlock")
# The published default, 512 px, shows its tiles in flat skies; 1024 px is the size DC-AE is used at in one piece.
_DEFAULT_TILE = 1024

Network = Callable[[Tensor], Tensor]  # an encoder or a decoder


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(Config):
    """Fields of the published config.json; per-stage tuples run from the full picture to the latent."""

    title: ClassVar[str] = "autoencoder"

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
        # Any other spelling means the other kind to diffusers, without a word; "Conv" is the published one.
        check_choice("upsample_block_type", self.upsample_block_type, ("interpolate", "pixel_shuffle"))
        check_choice("downsample_block_type", self.downsample_block_type, ("Conv", "conv", "pixel_unshuffle"))
        check_choice("decoder_conv_act_fn", self.decoder_conv_act_fn, ACTIVATIONS)
        for name in _per_stage(self.decoder_norm_types, num_stages):
            check_choice("decoder_norm_types", name, NORMS)
        for name in _per_stage(self.decoder_act_fns, num_stages):
            check_choice("decoder_act_fns", name, ACTIVATIONS)
        for name in ("in_channels", "latent_channels", "scaling_factor"):
            if not getattr(self, name) > 0:  # so that NaN is refused too
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")
        _check_stages(self, "encoder")
        _check_stages(self, "decoder")
        _check_shortcuts(self)


class AutoencoderDC(nn.Module):
    """Encoder and decoder. Latents here are raw: callers multiply by `config.scaling_factor`.

    Pictures are (B,3,H,W) in [-1,1] with H and W divisible by `spatial_compression_ratio`; latents are
    (B,latent_channels,H/ratio,W/ratio). Both ways are deterministic and run in the weights' dtype.
    """

    config_class = AutoencoderConfig
    published_class_name = "AutoencoderDC"

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.spatial_compression_ratio: int = 2 ** (len(config.encoder_block_out_channels) - 1)
        self.use_slicing = False
        self.tiling: Tiling | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The weights' device."""
        return next(self.parameters()).device

    def encode(self, image: Tensor) -> Tensor:
        """Picture (B,3,H,W) in [-1,1] -> raw latent (B,C,h,w). ValueError for other channels or sizes."""
        _check_input("picture", image, self.config.in_channels)
        ratio = self.spatial_compression_ratio
        for axis, size in zip(("height", "width"), image.shape[2:], strict=True):
            if size == 0 or size % ratio:
                raise ValueError(f"picture {axis} must be a positive multiple of {ratio} pixels; got {size}")
        return self.run(self.encoder, image, in_step=ratio, out_step=1)

    def decode(self, latent: Tensor, *, should_stop: ShouldStop | None = None) -> Tensor:
        """Raw latent (B,C,h,w) -> picture (B,3,H,W), about [-1,1] and not clamped. ValueError for other channels.

        `should_stop` is asked before each tile and each slice; if it returns True, `stopping.Stopped` is raised.
        """
        _check_input("latent", latent, self.config.latent_channels)
        return self.run(
            self.decoder,
            latent,
            in_step=1,
            out_step=self.spatial_compression_ratio,
            should_stop=should_stop,
        )

    def forward(self, image: Tensor) -> Tensor:
        """The picture's reconstruction, `decode(encode(image))`."""
        return self.decode(self.encode(image))

    def enable_slicing(self) -> None:
        """Pictures of a batch go through one at a time: less memory, the same result."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Whole batches at once again."""
        self.use_slicing = False

    def enable_tiling(
        self,
        tile_size: int | None = None,
        overlap: int | None = None,
        *,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: float | None = None,
        tile_sample_stride_width: float | None = None,
    ) -> None:
        """Pictures larger than a tile go through in overlapping tiles that are blended (see `tiling`).

        Pixels, multiples of `spatial_compression_ratio`. `tile_size` is 1024 unless given, `overlap` (the least
        that neighbours share) a quarter of the tile. The other arguments are the published class's: they go
        before the first two, and a stride is the tile's size less the overlap. ValueError for sizes that do not
        fit the grid.
        """
        side = _DEFAULT_TILE if tile_size is None else tile_size
        height = side if tile_sample_min_height is None else tile_sample_min_height
        width = side if tile_sample_min_width is None else tile_sample_min_width
        self.tiling = Tiling.from_pixels(
            (height, width),
            (
                self._overlap(height, tile_sample_stride_height, overlap),
                self._overlap(width, tile_sample_stride_width, overlap),
            ),
            self.spatial_compression_ratio,
        )

    def disable_tiling(self) -> None:
        """Pictures of any size in one piece again."""
        self.tiling = None

    def _overlap(self, tile: int, stride: float | None, overlap: int | None) -> int:
        if stride is not None:
            return tile - round(stride)
        if overlap is not None:
            return overlap
        return tile // 4 // self.spatial_compression_ratio * self.spatial_compression_ratio

    def run(
        self,
        network: Network,
        x: Tensor,
        *,
        in_step: int,
        out_step: int,
        should_stop: ShouldStop | None = None,
    ) -> Tensor:
        """`network(x)`, one picture at a time where slicing is on, in tiles where tiling is.

        A latent cell is `in_step` pixels of x on each side, and `out_step` of the result.
        """

        def run_tile(tile: Tensor) -> Tensor:
            stop_if(should_stop)
            return network(tile)

        def run_slice(part: Tensor) -> Tensor:
            if self.tiling is None:
                return run_tile(part)
            return run_tiled(run_tile, part, self.tiling, in_step=in_step, out_step=out_step)

        if self.use_slicing and len(x) > 1:
            return torch.cat([run_slice(picture) for picture in x.chunk(len(x))])
        return run_slice(x)


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
            stages.append(Stage(*blocks))
        self.down_blocks = nn.ModuleList(stages)
        self.conv_out = nn.Conv2d(channels[-1], config.latent_channels, 3, padding=1)
        self.latent_channels = config.latent_channels
        self.out_shortcut = config.encoder_out_shortcut

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv_in(image.contiguous(memory_format=torch.channels_last))
        for stage in self.down_blocks:
            x = stage(x)
        latent: Tensor = self.conv_out(x)
        if self.out_shortcut:
            latent = latent + average_channels(x, self.latent_channels)
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
            stages.append(Stage(*blocks))
        self.up_blocks = nn.ModuleList(stages)  # stage 0 is the full picture, so it runs last
        width = channels[0] if layers[0] > 0 else channels[1]
        self.norm_out = ChannelRMSNorm(width)
        self.conv_act = ACTIVATIONS[config.decoder_conv_act_fn]()
        self.conv_out: nn.Module
        if layers[0] > 0:
            self.conv_out = nn.Conv2d(width, config.in_channels, 3, padding=1)
        else:
            self.conv_out = UpBlock(width, config.in_channels, interpolate=interpolate, shortcut=False)

    def forward(self, latent: Tensor) -> Tensor:
        latent = latent.contiguous(memory_format=torch.channels_last)
        x = self.conv_in(latent)
        if self.in_shortcut:
            x = x + repeat_channels(latent, self.in_repeats)
        for stage in reversed(self.up_blocks):
            x = stage(x)
        image: Tensor = self.conv_out(self.activated(x))
        return image

    def activated(self, x: Tensor) -> Tensor:
        """The last block's result, normalised and activated."""
        out: Tensor = self.conv_act(self.norm_out(x))
        return out


def _make_block(
    kind: str, channels: int, config: AutoencoderConfig, scales: tuple[int, ...], norm: str, activation: str
) -> nn.Module:
    if kind == "ResBlock":
        return ResBlock(channels, norm, activation)
    return EfficientViTBlock(channels, config.attention_head_dim, scales, norm)


def _per_stage(value: str | tuple[str, ...], num_stages: int) -> tuple[str, ...]:
    return (value,) * num_stages if isinstance(value, str) else value


# --- Checks ------------------------------------------------------------------------------------------------------


def _check_input(name: str, x: Tensor, channels: int) -> None:
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"a {name} must be (batch, {channels}, height, width); got {tuple(x.shape)}")


def _check_stages(config: AutoencoderConfig, side: str) -> None:
    """The stages of one side ("encoder", "decoder"): how many layers each has and what they are."""
    channels = getattr(config, f"{side}_block_out_channels")
    layers = getattr(config, f"{side}_layers_per_block")
    scales = getattr(config, f"{side}_qkv_multiscales")
    kinds = _per_stage(getattr(config, f"{side}_block_types"), len(channels))
    for i, (width, count, kind) in enumerate(zip(channels, layers, kinds, strict=True)):
        if width < 1:
            raise ValueError(f"{side}_block_out_channels must be positive; got {channels}")
        # Without layers a stage has no convolution to change the grid: stage 0 has another one, the last needs none.
        least = 0 if len(channels) > 1 and i in (0, len(channels) - 1) else 1
        if count < least:
            raise ValueError(
                f"{side}_layers_per_block[{i}] must be at least {least} (0 is for the first and last of "
                f"several stages); got {count}"
            )
        check_choice(f"{side}_block_types", kind, _BLOCKS)
        if count and kind == "EfficientViTBlock":
            _check_attention(f"{side} stage {i}", width, config.attention_head_dim, scales[i])


def _check_attention(stage: str, channels: int, head_dim: int, kernel_sizes: tuple[int, ...]) -> None:
    if not 1 <= head_dim <= channels:
        raise ValueError(
            f"attention_head_dim must be from 1 to {channels}, the channels of {stage}; got {head_dim}"
        )
    if any(size < 1 or size % 2 == 0 for size in kernel_sizes):
        raise ValueError(f"qkv_multiscales of {stage} must be odd kernel sizes; got {kernel_sizes}")


def _check_shortcuts(config: AutoencoderConfig) -> None:
    """Shortcuts average or repeat channels in equal groups, so sizes must divide."""
    for side, shortcut in (("encoder", config.encoder_out_shortcut), ("decoder", config.decoder_in_shortcut)):
        channels = getattr(config, f"{side}_block_out_channels")
        layers = getattr(config, f"{side}_layers_per_block")
        if shortcut and channels[-1] % config.latent_channels:
            raise ValueError(
                f"latent_channels must divide the {channels[-1]} channels of the {side}'s last stage "
                f"for its shortcut; got {config.latent_channels}"
            )
        for i, (outer, inner) in enumerate(pairwise(channels)):
            if layers[i] and 4 * outer % inner:
                raise ValueError(
                    f"{side}_block_out_channels[{i + 1}] must divide {4 * outer}, 4 times the stage before, "
                    f"for the shortcut between them; got {inner}"
                )
    if config.downsample_block_type == "pixel_unshuffle":
        for width in config.encoder_block_out_channels[1:]:
            if width % 4:
                raise ValueError(
                    f"encoder_block_out_channels after the first must be multiples of 4 for pixel_unshuffle; got {width}"
                )
