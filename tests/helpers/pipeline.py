"""Pipelines small enough for any test: a tiny text encoder, transformer and autoencoder with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from sana_sprint.models.autoencoder import AutoencoderConfig, AutoencoderDC
from sana_sprint.models.transformer import SanaTransformer2DModel, TransformerConfig
from sana_sprint.pipelines.text_to_image import SanaSprintPipeline
from sana_sprint.scheduler import SCMScheduler
from tests.helpers.models import TRANSFORMERS, randomize
from tests.helpers.text import tiny_text_encoder, tiny_tokenizer

PROMPT = "a red cat on the moon"
LONG = "the tiny astronaut in a photo of dogs"  # more tokens than PROMPT: rows of a batch get padding

# Captions as wide as the tiny text encoder; 8 tokens of 4 pixels: a native side of 32 pixels.
TRANSFORMER: dict[str, Any] = {**TRANSFORMERS["sprint"], "caption_channels": 32}
_STAGES = {
    "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 8, 16),
    "decoder_block_out_channels": (8, 8, 16),
    "encoder_layers_per_block": (1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1),
    "encoder_qkv_multiscales": ((), (), ()),
    "decoder_qkv_multiscales": ((), (), (5,)),
}
AUTOENCODER: dict[str, Any] = {
    **_STAGES,
    "latent_channels": 4,
    "attention_head_dim": 8,
    "upsample_block_type": "interpolate",
    "downsample_block_type": "conv",
    "scaling_factor": 0.41407,
}
# 32 pixels per token and 32 tokens a side, the only form in which the published pipeline has buckets.
BUCKET_TRANSFORMER: dict[str, Any] = {**TRANSFORMER, "num_layers": 2, "sample_size": 32}
BUCKET_AUTOENCODER: dict[str, Any] = {
    **AUTOENCODER,
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": (4, 4, 4, 8, 8, 8),
    "decoder_block_out_channels": (4, 4, 4, 8, 8, 8),
    "encoder_layers_per_block": (0, 1, 1, 1, 1, 1),
    "decoder_layers_per_block": (0, 1, 1, 1, 1, 1),
    "encoder_qkv_multiscales": ((),) * 6,
    "decoder_qkv_multiscales": ((),) * 6,
}


def randomize_autoencoder(vae: torch.nn.Module) -> None:
    """Random weights whose decoder turns unit latents into pictures of strong contrast, few of them clipped."""
    randomize(vae, seed=1)
    num_stages = len(vae.config.decoder_block_out_channels)
    with torch.no_grad():
        for parameter in vae.decoder.conv_out.parameters():
            parameter.mul_(1.0 if num_stages < 6 else 0.5)  # each stage adds to the spread


def tiny_pipeline(
    transformer: dict[str, Any] = TRANSFORMER, autoencoder: dict[str, Any] = AUTOENCODER
) -> SanaSprintPipeline:
    """All parts in fp32 on the CPU; the same weights each time."""
    model = SanaTransformer2DModel(TransformerConfig(**transformer))
    randomize(model, seed=2)
    vae = AutoencoderDC(AutoencoderConfig(**autoencoder))
    randomize_autoencoder(vae)
    return SanaSprintPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_text_encoder(),
        vae=vae.eval(),
        transformer=model.eval(),
        scheduler=SCMScheduler(),
    )


def published_pipeline(
    transformer: dict[str, Any] = TRANSFORMER, autoencoder: dict[str, Any] = AUTOENCODER
) -> diffusers.SanaSprintPipeline:
    """The published classes with random weights; equal to those of `tiny_pipeline`."""
    model = diffusers.SanaTransformer2DModel(**transformer)
    randomize(model, seed=2)
    vae = diffusers.AutoencoderDC(**autoencoder)
    randomize_autoencoder(vae)
    pipe = diffusers.SanaSprintPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_text_encoder(),
        vae=vae.eval(),
        transformer=model.eval(),
        scheduler=diffusers.SCMScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_published_folder(
    folder: Path, transformer: dict[str, Any] = TRANSFORMER, autoencoder: dict[str, Any] = AUTOENCODER
) -> Path:
    """A model folder written by the published pipeline."""
    published_pipeline(transformer, autoencoder).save_pretrained(folder)
    return folder


def pixels(images: Any) -> np.ndarray:
    """PIL pictures, or one -> int array (B,H,W,3)."""
    pictures = images if isinstance(images, list) else [images]
    return np.stack([np.asarray(picture, dtype=np.int64) for picture in pictures])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same_pictures(found: Any, expected: Any) -> None:
    """Equal up to one level: a batch sums in another order than a single picture, which can tip a rounding."""
    assert np.abs(pixels(found) - pixels(expected)).max() <= 1


def assert_other_pictures(found: Any, expected: Any) -> None:
    """Unrelated pictures differ by about 50 of 255 levels."""
    assert np.abs(pixels(found) - pixels(expected)).mean() > 1
