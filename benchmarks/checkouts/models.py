"""Items on single models with random weights, loaded as a pipeline loads them, so that its speed is put on."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from checkouts import fixtures
from checkouts.fixtures import AUTOENCODERS, GRIDS, TRANSFORMERS
from checkouts.record import Record, item
from sana_sprint import SanaSprintPipeline, SCMScheduler

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_transformer(name: str, dtype: torch.dtype) -> Any:
    folder = fixtures.FOLDER / "transformers" / name
    return quiet(SanaSprintPipeline.from_pretrained(folder, torch_dtype=dtype))


def load_autoencoder(name: str, dtype: torch.dtype, **how: Any) -> Any:
    return SanaSprintPipeline.from_pretrained(
        fixtures.FOLDER / "autoencoders" / name, torch_dtype=dtype, **how
    ).vae


# ----- transformers ---------------------------------------------------------------------------------------------------


def _each_transformer(function: Any) -> Any:
    for name, dtype in itertools.product(TRANSFORMERS, DTYPES):
        item(f"transformer/{name}/{dtype}", name, DTYPES[dtype])(function)
    return function


@_each_transformer
def transformer(record: Record, name: str, dtype: torch.dtype) -> None:
    """Latents of 1, 2 and 3 steps, for padded and for whole captions."""
    pipe = load_transformer(name, dtype)
    config = pipe.transformer.config
    height, width = GRIDS.get(name, (8, 12))
    text = noise(2, 7, config.caption_channels, seed=2).to(dtype)
    whole = torch.ones(2, 7, dtype=torch.bool)
    padded = whole.clone()
    padded[1, 3:] = False
    cases = itertools.product((1,) if name == "large" else (1, 2, 3), (("whole", whole), ("padded", padded)))
    for steps, (kind, mask) in cases:
        made = pipe(
            prompt_embeds=text,
            prompt_attention_mask=mask,
            num_inference_steps=steps,
            guidance_scale=[4.0, 4.7] if config.guidance_embeds else None,
            height=32 * height,
            width=32 * width,
            use_resolution_binning=False,
            output_type="latent",
            seed=3,
        )
        record.note(f"{steps} steps, {kind}", made.images)
        record.note(f"{steps} steps, {kind}: times", list(made.times))


# ----- autoencoders ---------------------------------------------------------------------------------------------------


def _each_autoencoder(function: Any) -> Any:
    for name, dtype in itertools.product(AUTOENCODERS, DTYPES):
        item(f"autoencoder/{name}/{dtype}", name, DTYPES[dtype])(function)
    return function


@_each_autoencoder
@torch.no_grad()
def autoencoder(record: Record, name: str, dtype: torch.dtype) -> None:
    """Both ways, where grids of the large ones are computed in strips, by minimal filtering and as phases."""
    vae = load_autoencoder(name, dtype)
    ratio, is_large = vae.spatial_compression_ratio, name.startswith("large")
    # Of the large ones stage 0 goes in strips in either dtype, and no grid is a multiple of a strip.
    height, width = ((74, 80) if dtype == torch.float32 else (106, 112)) if is_large else (10, 6)
    batch = 1 if is_large else 2
    latent = noise(batch, vae.config.latent_channels, height, width).to(dtype)
    picture = noise(batch, 3, height * ratio, width * ratio, seed=2).clamp(-1, 1).to(dtype)
    record.note("decode", vae.decode(latent))
    record.note("encode", vae.encode(picture))
    if is_large:
        small = noise(1, vae.config.latent_channels, 9, 11, seed=4).to(dtype)
        record.note("decode after another size", vae.decode(small))
        return
    record.note("forward", vae(picture))
    with torch.enable_grad():
        record.note("decode with gradients", vae.decode(latent))
    with torch.inference_mode():
        record.note("decode in inference mode", vae.decode(latent))
    vae.enable_slicing()
    record.note("decode sliced", vae.decode(latent))
    vae.disable_slicing()
    vae.enable_tiling(4 * ratio, ratio)
    record.note("decode tiled", vae.decode(latent))
    record.note("encode tiled", vae.encode(picture))
    vae.disable_tiling()
    record.note("decode in one piece again", vae.decode(latent))


@item("autoencoder/cast")
@torch.no_grad()
def autoencoder_cast(record: Record) -> None:
    """Numbers derived from weights follow these: after a cast, and after a write in place."""
    vae = load_autoencoder("mixed_conv", torch.float32)
    latent = noise(1, vae.config.latent_channels, 8, 8)
    record.note("fp32", vae.decode(latent))
    vae.to(torch.bfloat16)
    record.note("cast", vae.decode(latent.bfloat16()))
    for parameter in vae.parameters():
        parameter.mul_(0.9)
    record.note("written to", vae.decode(latent.bfloat16()))


# ----- quantised ------------------------------------------------------------------------------------------------------


@item("quantize/autoencoder/int8", "large_conv", "int8")
@item("quantize/autoencoder/int8-shuffle", "large_shuffle", "int8")
@item("quantize/autoencoder/int8-weights", "large_conv", "int8-weights")
@item("quantize/autoencoder/int4-weights", "mixed_conv", "int4-weights")
@item("quantize/autoencoder/nf4", "mixed_conv", "nf4")
@torch.no_grad()
def quantized_autoencoder(record: Record, name: str, preset: str) -> None:
    vae = load_autoencoder(name, torch.bfloat16, quantization_config={"vae": preset})
    height, width = (74, 80) if name.startswith("large") else (10, 6)
    record.note("decode", vae.decode(noise(1, vae.config.latent_channels, height, width).bfloat16()))
    record.note("weights", dict(vae.state_dict()))


@item("scheduler")
def scheduler(record: Record) -> None:
    steps = SCMScheduler()
    for count in (1, 2, 3, 4):
        steps.set_timesteps(count)
        record.note(f"{count} times", steps.timesteps)
        sample = noise(2, 4, 6, 6)
        generator = torch.Generator().manual_seed(7)
        for i, t in enumerate(steps.timesteps[:-1]):
            sample, clean = steps.step(noise(2, 4, 6, 6, seed=8 + i), t, sample, generator, return_dict=False)
            record.note(f"{count} steps, {i}", clean)
    record.note("config", steps.config.to_dict())
