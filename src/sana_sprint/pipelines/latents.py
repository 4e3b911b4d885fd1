"""Pictures to latents and back by the autoencoder, and pictures of the model's size to the size asked for."""

from __future__ import annotations

import copy
import logging

import torch
from torch import Tensor

from sana_sprint.models.autoencoder import AutoencoderDC
from sana_sprint.precision import check_finite
from sana_sprint.stopping import ShouldStop

logger = logging.getLogger(__name__)

MAX_TILE = 1024  # pixels; of the tiles that are used when memory ran out


def encode(vae: AutoencoderDC, pictures: Tensor) -> Tensor:
    """Pictures (B,3,H,W) in [-1,1] -> latents (B,C,h,w) of unit variance, fp32.

    Raises:
        NonFiniteError: if the latents hold NaN or infinity.
    """
    raw = check_finite(vae.encode(pictures.to(vae.device, vae.dtype)), "the autoencoder's encoder")
    scale: float = vae.config.scaling_factor
    return raw.float() * scale


def decode(vae: AutoencoderDC, u0: Tensor, should_stop: ShouldStop | None = None) -> Tensor:
    """Clean latents (B,C,h,w) of unit variance -> pictures (B,3,H,W), about [-1,1], fp32.

    If memory runs out, once more with slicing and tiling, for this call only and with a warning in the log.

    Raises:
        MemoryError: if that does not fit either.
        NonFiniteError: if the pictures hold NaN or infinity.
        Stopped: if `should_stop`, asked before each piece that is decoded by itself, returned True.
    """
    latent = (u0 / vae.config.scaling_factor).to(vae.device, vae.dtype)
    try:
        images: Tensor | None = vae.decode(latent, should_stop=should_stop)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        images = None  # retried outside this block, which keeps the failed call's tensors alive
    if images is None:
        logger.warning("not enough memory to decode in one piece; decoding one by one in tiles instead")
        images = _decode_frugally(vae, latent, should_stop)
    return check_finite(images, "the autoencoder's decoder").float()


def _decode_frugally(vae: AutoencoderDC, latent: Tensor, should_stop: ShouldStop | None) -> Tensor:
    """One by one, in tiles of half the longer side (or of the tiles there were), 1024 pixels at most."""
    # A copy shares the weights; the original keeps its settings, which other threads rely on.
    frugal = copy.copy(vae)
    ratio = vae.spatial_compression_ratio
    longest = max(latent.shape[2:] if vae.tiling is None else vae.tiling.tile)
    frugal.enable_slicing()
    frugal.enable_tiling(min(-(-longest // 2), max(1, MAX_TILE // ratio)) * ratio)
    try:
        images: Tensor = frugal.decode(latent, should_stop=should_stop)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        height, width = latent.shape[2] * ratio, latent.shape[3] * ratio
        raise MemoryError(
            f"not enough memory on {latent.device} to decode {latent.shape[0]} pictures of {height}x{width}, not even "
            "one by one in tiles: ask for smaller pictures, call enable_vae_tiling with smaller tiles, or free memory "
            "(output_type='latent' leaves the decoding to you)"
        ) from error
    return images


def is_out_of_memory(error: BaseException) -> bool:
    """Tells out-of-memory errors, of any device, from others."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    message = str(error).lower()  # the CPU's and some other allocators raise plain RuntimeErrors
    return isinstance(error, RuntimeError) and (
        "out of memory" in message
        or "not enough memory" in message
        or "can't allocate memory" in message
        or "cannot allocate memory" in message
    )
