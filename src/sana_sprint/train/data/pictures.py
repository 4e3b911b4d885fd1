"""Encoded pictures of any kind to RGB arrays of a wanted size, and to batches."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from sana_sprint.images import to_rgb
from sana_sprint.models.autoencoder import AutoencoderDC
from sana_sprint.resolutions import nearest_bucket
from sana_sprint.train.data.readers.base import Record, Sample, Unreadable


def decode(record: Record) -> np.ndarray:
    """A record's picture as uint8 (H,W,3), upright, and over white where it is transparent.

    Raises:
        Unreadable: it is damaged, or no picture.
    """
    try:
        with Image.open(io.BytesIO(record.picture)) as picture:
            return np.asarray(to_rgb(picture))
    # Decoders meet damage with whatever exception lies nearest: OSError, SyntaxError, struct.error, IndexError...
    except Exception as error:
        reason = "no picture that can be decoded" if isinstance(error, UnidentifiedImageError) else error
        raise Unreadable(record.name, str(reason)) from error


def fit(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (H,W,3) scaled alike in both directions and cropped around the centre to (height, width).

    One bicubic resampling of the part that stays, with a filter as wide as the shrinking (antialiased).
    """
    old_height, old_width = pixels.shape[:2]
    if (old_height, old_width) == (height, width):
        return pixels
    scale = min(old_height / height, old_width / width)
    left, top = (old_width - width * scale) / 2, (old_height - height * scale) / 2
    # Rounding must not put the box's far corner a hair outside.
    box = (
        max(0.0, left),
        max(0.0, top),
        min(left + width * scale, old_width),
        min(top + height * scale, old_height),
    )
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC, box=box))


def fit_bucket(pixels: np.ndarray, size: int | None, multiple: int) -> np.ndarray:
    """`fit` to the nearest aspect bucket of native side `size`, its sides multiples of `multiple`; None changes nothing."""
    if size is None:
        return pixels
    height, width = pixels.shape[:2]
    return fit(pixels, *nearest_bucket(height, width, size, multiple))


def pictures(source: Callable[[int], Sample], indices: Sequence[int]) -> tuple[Tensor, list[tuple[str, ...]]]:
    """A batch of samples: (B,3,H,W) fp32 in [-1,1] in channels_last memory, and each picture's captions.

    Args:
        source: samples by index.
        indices: which.

    Raises:
        ValueError: the pictures are of several shapes.
    """
    samples = [source(index) for index in indices]
    arrays = [image for image, _ in samples]
    if len(shapes := {array.shape for array in arrays}) > 1:
        found = ", ".join(f"{width}x{height}" for height, width, _ in sorted(shapes)[:3])
        raise ValueError(f"pictures of one batch must have one size, got {found}: set a size to crop to")
    return to_tensor(arrays), [captions for _, captions in samples]


def to_tensor(arrays: Sequence[np.ndarray]) -> Tensor:
    """uint8 arrays (H,W,3) of one shape -> fp32 (B,3,H,W) in [-1,1], channels_last."""
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def channels_last(autoencoder: AutoencoderDC) -> AutoencoderDC:
    """The autoencoder with its weights in channels_last memory, as batches of `pictures` are: no copies between layers."""
    autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs leave it out
    return autoencoder
