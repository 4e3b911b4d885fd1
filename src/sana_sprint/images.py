"""Pictures: conversion between tensors in [-1,1] and PIL, grids, resizing, and settings in PNG files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from sana_sprint import __version__
from sana_sprint.resolutions import cover

SETTINGS_KEY = "sana_sprint"  # PNG text chunk with the settings as JSON
INFOTEXT_KEY = "parameters"  # PNG text chunk that other picture tools write and read


def read_picture(path: str | os.PathLike[str]) -> Image.Image:
    """A picture file, read in full. Raises ValueError, naming the file, if it cannot be read."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the picture {os.fspath(path)}: {error}") from error


# ----- tensors to pictures and back -----------------------------------------------------------------------------------


def to_uint8(images: Tensor) -> np.ndarray:
    """(B,3,H,W) in [-1,1], clamped -> uint8 (B,H,W,3), rounded to nearest.

    Raises:
        ValueError: a value is not finite (a black picture would hide that).
    """
    if not torch.isfinite(images).all():
        raise ValueError("the picture has values that are not finite")
    scaled = images.float().clamp(-1, 1).add_(1).mul_(127.5).round_()
    # Channels last already on the device: PIL would gather them one by one.
    array: np.ndarray = scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return array


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B,3,H,W) in [-1,1] -> PIL pictures."""
    return [Image.fromarray(array) for array in to_uint8(images)]


def to_unit(images: Tensor) -> Tensor:
    """(B,3,H,W) in [-1,1] -> fp32 (B,3,H,W) in [0,1], clamped."""
    return images.float().add(1).div(2).clamp(0, 1)


def to_numpy(images: Tensor) -> np.ndarray:
    """(B,3,H,W) in [-1,1] -> fp32 array (B,H,W,3) in [0,1], clamped."""
    array: np.ndarray = to_unit(images).permute(0, 2, 3, 1).cpu().numpy()
    return array


def to_rgb(picture: Image.Image, *, background: str = "white") -> Image.Image:
    """A picture of any mode as RGB, upright.

    The EXIF orientation is applied, 16-bit greys keep their range, and transparency shows `background`.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16-bit grey: a plain conversion would clip at 255
        picture = Image.fromarray((np.asarray(picture) / 257).round().clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture)
    return picture.convert("RGB")


def from_pil(
    picture: Image.Image, *, background: str = "white", device: torch.device | None = None
) -> Tensor:
    """A picture of any mode -> fp32 (1,3,H,W) in [-1,1] on `device` (None: the CPU), as `to_rgb` has it."""
    array = torch.from_numpy(np.array(to_rgb(picture, background=background))).to(device)
    return array.permute(2, 0, 1)[None].float().div(127.5).sub(1)


def resize_and_crop(
    images: Tensor, *, resized: tuple[int, int], corner: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Resize (B,C,H,W) to `resized`, then crop `size` at `corner`; each is (vertical, horizontal).

    Antialiased bilinear when shrinking, so that thin lines fade instead of breaking up; plain bilinear when enlarging, as
    published. Returns fp32, the same values where neither is needed.

    Raises:
        ValueError: if the crop does not lie inside the resized picture.
    """
    (top, left), (height, width) = corner, size
    if min(top, left) < 0 or min(height, width) < 1 or top + height > resized[0] or left + width > resized[1]:
        raise ValueError(f"cannot cut {height}x{width} at {corner} out of a picture of {resized}")
    images = images.float()
    if tuple(images.shape[-2:]) != resized:
        images = nn.functional.interpolate(
            images, size=resized, mode="bilinear", align_corners=False, antialias=True
        )
    return images[..., top : top + height, left : left + width]


def resize_to_cover(images: Tensor, height: int, width: int) -> Tensor:
    """(B,C,H,W) scaled uniformly until it covers (height, width), then cropped around its centre; fp32."""
    plan = cover(images.shape[-2], images.shape[-1], height, width)
    return resize_and_crop(
        images, resized=(plan.height, plan.width), corner=(plan.top, plan.left), size=(height, width)
    )


def grid(pictures: Sequence[Image.Image], *, columns: int, gap: int = 2) -> Image.Image:
    """Equal-sized pictures in rows of `columns`, on white."""
    if not pictures:
        raise ValueError("a grid needs at least one picture")
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


# ----- settings in PNG files ------------------------------------------------------------------------------------------


def save_png(
    picture: Image.Image, file: str | os.PathLike[str] | IO[bytes], settings: Mapping[str, Any]
) -> None:
    """Write a PNG with its settings: as JSON, and as a line that other tools read.

    The line has `prompt`, `num_inference_steps`, `guidance_scale`, `seed`, `width`, `height` and `model`, those that are
    present.
    """
    info = PngInfo()
    info.add_itxt(SETTINGS_KEY, json.dumps(settings, ensure_ascii=False))
    info.add_itxt(INFOTEXT_KEY, infotext(settings))
    picture.save(file, format="PNG", pnginfo=info)


def picture_settings(
    *,
    prompt: str,
    seed: int,
    num_inference_steps: int,
    guidance_scale: float | None,
    times: Sequence[float],
    sizes: Mapping[str, int],
    model: str,
    dtype: str,
    control: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """How to make a picture again, for `save_png`.

    Args:
        prompt, seed, num_inference_steps, times: of the pipeline's call; `times` are angles, from the first to 0.
        guidance_scale: None for a model that has none.
        sizes: `width` and `height` of the picture, `model_width` and `model_height` before it was resized, in pixels.
        model: its name.
        dtype: of the transformer, such as "bfloat16".
        control: the arguments about a picture that was followed.
    """
    return {
        "prompt": prompt,
        "seed": seed,
        "num_inference_steps": num_inference_steps,
        **({} if guidance_scale is None else {"guidance_scale": guidance_scale}),
        **(control or {}),
        "times": list(times),
        **sizes,
        "model": model,
        "dtype": dtype,
        "version": f"sana-sprint {__version__}",
    }


def read_settings(picture: Image.Image) -> dict[str, Any] | None:
    """The settings that `save_png` wrote into a PNG file, or None if there are none.

    Raises:
        ValueError: if there is such a text but it is not a JSON object.
    """
    text = getattr(picture, "text", {}).get(SETTINGS_KEY)
    if text is None:
        return None
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise ValueError(f"the picture's settings are not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"the picture's settings must be a JSON object, got: {type(settings).__name__}")
    return settings


def infotext(settings: Mapping[str, Any]) -> str:
    """Prompt, then `Steps: 2, CFG scale: 4.5, Seed: 1, Size: 640x480, Model: name`: the usual one-line format."""
    labels = {"Steps": "num_inference_steps", "CFG scale": "guidance_scale", "Seed": "seed"}
    parts = [f"{label}: {settings[key]}" for label, key in labels.items() if key in settings]
    if "width" in settings and "height" in settings:
        parts.append(f"Size: {settings['width']}x{settings['height']}")
    if "model" in settings:
        parts.append(f"Model: {settings['model']}")
    return "\n".join(filter(None, [settings.get("prompt", ""), ", ".join(parts)]))
