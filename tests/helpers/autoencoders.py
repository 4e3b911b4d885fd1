"""Tiny autoencoder configurations and random weights that several test modules share."""

from __future__ import annotations

from typing import Any

import torch

from sana_sprint.models.autoencoder import AutoencoderConfig, AutoencoderDC
from tests.helpers.models import randomize

RES, VIT = "ResBlock", "EfficientViTBlock"


def _sides(**fields: Any) -> dict[str, Any]:
    """The same fields for encoder and decoder."""
    return {f"{side}_{name}": value for name, value in fields.items() for side in ("encoder", "decoder")}


def _four_stages(*channels: int) -> dict[str, Any]:
    return _sides(block_out_channels=channels, layers_per_block=(1,) * 4, qkv_multiscales=((),) * 4)


_BASE: dict[str, Any] = {
    "latent_channels": 4,
    "attention_head_dim": 4,
    **_sides(block_out_channels=(8, 16, 16), layers_per_block=(1, 1, 1), qkv_multiscales=((), (), ())),
}
_GRID_BY_CONV = {"downsample_block_type": "Conv", "upsample_block_type": "interpolate"}
_SKIP_FIRST = _sides(layers_per_block=(0, 1, 2))

# Between them: every block, every way to change the grid, every group size of a shortcut, every norm and activation.
AUTOENCODERS: dict[str, dict[str, Any]] = {
    "plain": _BASE,
    "published": {
        **_BASE,
        **_GRID_BY_CONV,
        **_sides(block_types=(RES, VIT, VIT), layers_per_block=(2, 1, 2), qkv_multiscales=((), (5,), (5,))),
        "scaling_factor": 0.41407,
    },
    "attention_everywhere": {**_BASE, **_sides(block_types=VIT, qkv_multiscales=((), (3,), (3, 5)))},
    "attention_outside": {**_BASE, **_sides(block_types=(VIT, RES, VIT), qkv_multiscales=((5, 3), (), ()))},
    "small_grids": {**_BASE, "attention_head_dim": 16, **_sides(block_types=(RES, VIT, VIT))},
    "one_head": {**_BASE, "attention_head_dim": 8, **_sides(block_types=(VIT, RES, RES))},
    "channels_left_over": {
        **_BASE,
        "attention_head_dim": 3,  # 16 channels hold five heads and one channel that no head sees
        **_sides(block_types=VIT, qkv_multiscales=((3,), (), (5,))),
    },
    "unshuffle_interpolate": {**_BASE, "upsample_block_type": "interpolate"},
    "conv_shuffle": {**_BASE, "downsample_block_type": "conv"},
    "skip_first": {**_BASE, **_SKIP_FIRST},
    "skip_first_by_conv": {**_BASE, **_GRID_BY_CONV, **_SKIP_FIRST},
    "skip_first_in_encoder": {**_BASE, "encoder_layers_per_block": (0, 2, 1)},
    "skip_first_in_decoder": {**_BASE, "decoder_layers_per_block": (0, 1, 1)},
    "skip_last": {**_BASE, **_sides(layers_per_block=(1, 2, 0))},
    "no_latent_shortcuts": {
        **_BASE,
        "latent_channels": 5,  # divides no stage's channels
        "encoder_out_shortcut": False,
        "decoder_in_shortcut": False,
    },
    # Groups of 16, 1, 8 and of 2, 6, 1 (4 times a stage's channels over the next one's).
    "shortcut_groups": {**_BASE, **_four_stages(32, 8, 32, 16)},
    "shortcut_groups_by_conv": {**_BASE, **_GRID_BY_CONV, **_four_stages(32, 8, 32, 16)},
    "odd_shortcut_groups": {**_BASE, **_four_stages(6, 12, 8, 32)},
    "batch_norm": {
        **_BASE,
        **_sides(block_types=(RES, VIT, RES)),
        "decoder_norm_types": "batch_norm",
        "decoder_act_fns": "relu",
        "decoder_conv_act_fn": "silu",
    },
    "per_stage_norms": {
        **_BASE,
        "decoder_norm_types": ("batch_norm", "rms_norm", "batch_norm"),
        "decoder_act_fns": ("relu6", "relu", "mish"),
        "decoder_conv_act_fn": "relu6",
    },
    "other_activations": {
        **_BASE,
        "decoder_act_fns": ("gelu", "swish", "silu"),
        "decoder_conv_act_fn": "gelu",
    },
    "four_channels_one_stage": {
        **_BASE,
        "in_channels": 4,
        **_sides(block_out_channels=(8,), layers_per_block=(1,), qkv_multiscales=((),)),
    },
}

# The f32c32 autoencoder of every published Sana model, as its config.json writes it.
PUBLISHED_AUTOENCODER: dict[str, Any] = {
    "attention_head_dim": 32,
    "decoder_act_fns": "silu",
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_types": [RES, RES, RES, VIT, VIT, VIT],
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "decoder_norm_types": "rms_norm",
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "downsample_block_type": "Conv",
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_block_types": [RES, RES, RES, VIT, VIT, VIT],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "in_channels": 3,
    "latent_channels": 32,
    "scaling_factor": 0.41407,
    "upsample_block_type": "interpolate",
}
PUBLISHED_PARAMETERS = 312_250_275


def autoencoder_config(name: str = "plain", **changes: Any) -> AutoencoderConfig:
    """`AUTOENCODERS[name]` with some fields changed."""
    return AutoencoderConfig(**{**AUTOENCODERS[name], **changes})


def tiny_autoencoder(name: str = "plain", seed: int = 0, **changes: Any) -> AutoencoderDC:
    """A randomised autoencoder of `AUTOENCODERS[name]` with some fields changed, in evaluation mode."""
    model = AutoencoderDC(autoencoder_config(name, **changes))
    randomize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for key, buffer in model.named_buffers():
        if key.endswith("running_mean"):
            buffer.normal_(generator=generator)
        elif key.endswith("running_var"):
            buffer.uniform_(0.5, 2.0, generator=generator)
    return model.eval()
