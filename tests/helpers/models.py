"""Tiny transformer configurations and random weights that several test modules share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sana_sprint.models.transformer import SanaTransformer2DModel, TransformerConfig

_BASE: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "num_layers": 3,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 12,
    "cross_attention_dim": 24,
    "caption_channels": 10,
    "sample_size": 8,
}
_QK_NORM = {"qk_norm": "rms_norm_across_heads"}

# Between them: each kind of published model, and each field away from its usual value.
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "sprint": {**_BASE, **_QK_NORM, "guidance_embeds": True},
    "teacher": {**_BASE, **_QK_NORM},
    "plain": _BASE,
    "patch2": {**_BASE, **_QK_NORM, "patch_size": 2, "guidance_embeds": True, "guidance_embeds_scale": 0.3},
    "positions": {**_BASE, "interpolation_scale": 2.0},
    "positions_patch2": {**_BASE, **_QK_NORM, "interpolation_scale": 1, "patch_size": 2, "sample_size": 12},
    "biases_and_affine": {**_BASE, "attention_bias": True, "norm_elementwise_affine": True, "norm_eps": 1e-3},
    "odd_sizes": {
        **_BASE,
        **_QK_NORM,
        "in_channels": 3,
        "out_channels": None,
        "num_layers": 1,
        "mlp_ratio": 2.7,
        "cross_attention_head_dim": 7,  # cross-attention narrower than the model
        "guidance_embeds": True,
    },
    "more_outputs": {**_BASE, "out_channels": 8, "num_cross_attention_heads": 5, "patch_size": 2},
}

_LARGE = {**_QK_NORM}  # the defaults are the 1.6B sizes
_SMALL = {
    **_QK_NORM,
    "num_layers": 28,
    "num_attention_heads": 36,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}

# Published sizes: config and number of parameters.
PUBLISHED_TRANSFORMERS: dict[str, tuple[dict[str, Any], int]] = {
    "sprint_1.6b": ({**_LARGE, "guidance_embeds": True}, 1_610_237_472),
    "sprint_0.6b": ({**_SMALL, "guidance_embeds": True}, 593_501_216),
    "teacher_1.6b": (_LARGE, 1_604_641_952),
    "teacher_0.6b": (_SMALL, 591_876_896),
    "plain_1.6b": ({}, 1_604_462_752),
    "plain_0.6b": ({**_SMALL, "qk_norm": None}, 591_747_872),
}


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights that exercise every term: no norm at one, no bias at zero, activations of about unit size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.3 * noise)


def tiny_transformer(name: str = "sprint", seed: int = 0, **changes: Any) -> SanaTransformer2DModel:
    """A randomised transformer of `TRANSFORMERS[name]` with some fields changed, in evaluation mode."""
    model = SanaTransformer2DModel(TransformerConfig(**{**TRANSFORMERS[name], **changes}))
    randomize(model, seed)
    return model.eval()


def transformer_inputs(
    config: TransformerConfig, batch: int = 2, grid: tuple[int, int] = (8, 8), tokens: int = 7, seed: int = 1
) -> dict[str, Tensor]:
    """Random latent, timestep, text, text_mask (the last caption keeps 3 tokens) and guidance (all different)."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    mask[-1, 3:] = False
    return {
        "latent": torch.randn(batch, config.in_channels, *grid, generator=generator),
        "timestep": torch.rand(batch, generator=generator),
        "text": torch.randn(batch, tokens, config.caption_channels, generator=generator),
        "text_mask": mask,
        "guidance": torch.linspace(1.0, 5.0, batch),
    }
