"""The artwork of the world: one picture with transparency for each emoji and style, recoloured when a hue is asked for.

Fluent Emoji 3D comes from files named by code points (`recipes.emoji3d.fetch` gets them), Noto Color Emoji from the
font. Licences and attribution: `recipes/emoji3d/LICENSES.md`.
"""

from __future__ import annotations

import os
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

STYLES = ("3D", "flat")
FONT_PATH = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
# sRGB of the middle tone of a recoloured thing.
HUES: dict[str, tuple[int, int, int]] = {
    "red": (214, 35, 45),
    "orange": (245, 130, 25),
    "yellow": (250, 215, 50),
    "green": (45, 165, 70),
    "blue": (45, 105, 225),
    "purple": (135, 65, 190),
    "pink": (250, 140, 185),
    "brown": (125, 75, 40),
    "black": (45, 45, 50),
    "white": (235, 235, 240),
}
_MIN_COLORED = (
    0.4  # part of a thing that must have colour of its own, so that recolouring changes what it looks like
)


def data_folder() -> Path:
    """The folder of the fetched files: the environment variable EMOJI3D_DATA, or data/emoji3d."""
    return Path(os.environ.get("EMOJI3D_DATA", "data/emoji3d"))


@lru_cache(maxsize=4096)
def artwork(emoji: str, style: str, hue: str | None, side: int) -> Image.Image:
    """The emoji's picture cut to its opaque box, RGBA with premultiplied colours ("RGBa").

    Args:
        emoji: the character, with its variation selector if it has one.
        style: one of `STYLES`.
        hue: one of `HUES`, or None for the colours that it has.
        side: most pixels that width and height may have; smaller originals stay as they are.

    Raises:
        FileNotFoundError: there is no such artwork.
    """
    if hue is not None:
        return recolor(artwork(emoji, style, None, side), HUES[hue])
    original = _from_file(emoji) if style == "3D" else _from_font(emoji)
    scale = min(1.0, side / max(original.size))
    return original.convert("RGBa").resize(_scaled(original.size, scale), Image.Resampling.LANCZOS)


def sprite(emoji: str, style: str, hue: str | None, size: int, *, side: int) -> Image.Image:
    """`artwork` with its longer side `size` pixels, as RGBA."""
    original = artwork(emoji, style, hue, side)
    shape = _scaled(original.size, size / max(original.size))
    return original.resize(shape, Image.Resampling.BICUBIC).convert("RGBA")


@cache
def takes_hue(emoji: str, style: str) -> bool:
    """Whether enough of the thing has colour, so that another hue shows."""
    pixels = np.asarray(artwork(emoji, style, None, 64).convert("RGBA"), dtype=np.float32) / 255
    opacity = pixels[..., 3]
    return float((_colorfulness(pixels[..., :3]) * opacity).sum() / opacity.sum()) >= _MIN_COLORED


def recolor(picture: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Gives the coloured parts of an RGBa picture another colour, and keeps their light and shade.

    The mean luminance of the coloured parts becomes `color`; darker tones go to black, lighter ones to white. Parts
    without colour (white eyes, black outlines, metal) stay.
    """
    pixels = np.asarray(picture.convert("RGBA"), dtype=np.float32) / 255
    rgb, opacity = pixels[..., :3], pixels[..., 3]
    weight = _colorfulness(rgb)
    luminance = rgb @ np.array([0.3, 0.59, 0.11], np.float32)
    weighted = weight * opacity
    middle = float((luminance * weighted).sum() / max(float(weighted.sum()), 1e-6))
    middle = min(max(middle, 0.15), 0.85)
    target = np.array(color, np.float32) / 255
    dark = target * (luminance / middle)[..., None]
    # Highlights fade to white only half of the way: more would wash the hue out.
    light = target + (1 - target) * (0.5 * (luminance - middle) / (1 - middle))[..., None]
    toned = np.where((luminance < middle)[..., None], dark, light)
    mixed = rgb + (toned - rgb) * weight[..., None]
    result = np.concatenate([mixed, opacity[..., None]], axis=2)
    return Image.fromarray((result.clip(0, 1) * 255).round().astype(np.uint8), "RGBA").convert("RGBa")


def _colorfulness(rgb: np.ndarray) -> np.ndarray:
    """From 0 (gray) to 1 (clearly coloured), of each pixel."""
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]  # faster than a reduction over an axis of three
    spread = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    colorful: np.ndarray = ((spread - 0.08) / 0.17).clip(0, 1)
    return colorful


def _scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def code_points(emoji: str) -> str:
    """A file's name without its suffix: the code points in hexadecimal, joined by hyphens."""
    return "-".join(f"{ord(character):04x}" for character in emoji)


def _from_file(emoji: str) -> Image.Image:
    folder = data_folder() / "fluent"
    name = code_points(emoji)
    for candidate in (name, f"{name}-fe0f", name.replace("-fe0f", "")):
        path = folder / f"{candidate}.webp"
        if path.is_file():
            with Image.open(path) as picture:
                return _cut(picture.convert("RGBA"), emoji)
    raise FileNotFoundError(
        f"{folder} has no artwork for {emoji} ({name}); hint: python -m recipes.emoji3d.fetch"
    )


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    if not FONT_PATH.is_file():
        raise FileNotFoundError(f"{FONT_PATH} is missing; hint: apt-get install fonts-noto-color-emoji")
    return ImageFont.truetype(str(FONT_PATH), 109)  # the one size that its bitmaps have


def _from_font(emoji: str) -> Image.Image:
    canvas = Image.new("RGBA", (180, 180), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((20, 20), emoji, font=_font(), embedded_color=True)
    return _cut(canvas, emoji)


def _cut(picture: Image.Image, emoji: str) -> Image.Image:
    box = picture.getchannel("A").point(lambda opacity: 255 if opacity > 16 else 0).getbbox()
    if box is None:
        raise FileNotFoundError(f"the artwork of {emoji} is empty")
    return picture.crop(box)
