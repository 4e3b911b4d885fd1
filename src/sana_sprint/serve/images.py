"""Encoded pictures: uploads are decoded within limits, results are encoded with their settings."""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from sana_sprint.images import picture_settings, save_png, to_rgb
from sana_sprint.serve.engine.job import Job, Result
from sana_sprint.serve.errors import ApiError

FORMATS = ("PNG", "JPEG", "WEBP")  # few decoders: each is a surface for attacks
DEFAULT_QUALITY = 90

# Raised by Pillow for damaged or hostile files; SyntaxError for a broken PNG chunk.
_BAD_FILE = (UnidentifiedImageError, OSError, ValueError, SyntaxError)
# Pillow's own limit is above ours; where warnings are errors it raises the second.
_HUGE_FILE = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def decode_upload(data: bytes, max_pixels: int) -> np.ndarray:
    """A PNG, JPEG or WebP file -> uint8 (H,W,3), the right way up, on white.

    Raises ApiError 400 for anything else, 413 for more than `max_pixels`, which is read from the header before a
    pixel is decoded.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            if picture.width * picture.height > max_pixels:
                raise Image.DecompressionBombError
            return np.array(to_rgb(picture))
    except _HUGE_FILE as error:
        message = f"image may have at most {max_pixels} pixels"
        raise ApiError(413, message, code="too_large", param="image") from error
    except _BAD_FILE as error:
        message = "image is not a readable PNG, JPEG or WebP file"
        raise ApiError(400, message, code="invalid_image", param="image") from error


def decode_text(text: str, max_pixels: int) -> np.ndarray:
    """As `decode_upload`, from base64 with or without a `data:` prefix. URLs are never fetched."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    elif "://" in text[:16]:
        message = "image must be base64 or a data: URL; this server fetches nothing"
        raise ApiError(400, message, code="no_fetching", param="image")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, "image is not base64", code="invalid_image", param="image") from error
    return decode_upload(data, max_pixels)


def encode(picture: Image.Image, output_format: str, quality: int | None, settings: dict[str, Any]) -> bytes:
    """A file of this format; a PNG keeps `settings`, as those of the command line do."""
    file = io.BytesIO()
    if output_format == "png":
        save_png(picture, file, settings)
    else:
        picture.save(file, output_format.upper(), quality=DEFAULT_QUALITY if quality is None else quality)
    return file.getvalue()


def settings_of(job: Job, result: Result, index: int, model: str) -> dict[str, Any]:
    """The settings that reproduce picture `index`."""
    request = job.request
    followed = {"kind": request.control_kind, "controlnet_conditioning_scale": request.control_scale}
    return picture_settings(
        prompt=request.prompt,
        seed=result.seeds[index],
        num_inference_steps=request.steps,
        guidance_scale=result.guidance_scale,
        times=result.times,
        sizes=vars(result.sizes),
        model=model,
        dtype=result.dtype,
        control=followed if job.has_image else None,
    )
