"""Picture sizes: the aspect-ratio buckets a model was trained on, and the crop from a bucket to the requested size.

Models are best near their native size, so a request is mapped to the bucket of the nearest aspect ratio, and the picture
is then resized and cropped to the requested size. Sizes are (height, width) in pixels.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass

PIXELS_AT_ONCE = 2**20  # in one call: what a picture of 1024 px needs, several smaller ones may take
BUCKET_UNITS = 16  # sides in the tables below are sixteenths of the native side

# Height and width of the buckets that are wide or square; the tall ones are the same transposed. These are the
# published tables of 512 and 1024 px models (the same but for scale) and of 2048 and 4096 px models.
_WIDE = (
    (8, 32), (8, 29), (9, 28), (9, 27), (9, 26), (10, 25), (10, 24), (11, 23), (11, 22), (11, 21), (12, 21), (12, 20),
    (13, 19), (13, 18), (14, 18), (14, 17), (15, 17), (15, 16), (16, 16),
)  # fmt: skip
_TALL = (
    (16, 15), (17, 15), (17, 14), (18, 14), (18, 13), (19, 13), (20, 12), (21, 12), (22, 11), (23, 11), (24, 10),
    (25, 10), (27, 9), (32, 8),
)  # fmt: skip
_EXTRA_WIDE = ((8, 31), (8, 30))
_EXTRA_TALL = ((26, 9), (28, 9), (29, 8), (30, 8), (31, 8))
_LARGE_NATIVE = 2048  # models from here up have the extra buckets


def native_size(sample_size: int, pixels_per_cell: int) -> int:
    """Side in pixels of the square pictures that a transformer was trained on, from the sides of its latents in cells."""
    return sample_size * pixels_per_cell


@dataclass(frozen=True)
class Size:
    """The requested size (`height`, `width`) and the model's (`model_height`, `model_width`), in pixels."""

    height: int
    width: int
    model_height: int
    model_width: int

    @property
    def model_pixels(self) -> int:
        return self.model_height * self.model_width


@dataclass(frozen=True)
class ResizeCrop:
    """Resize to (`height`, `width`), then crop the requested size at (`top`, `left`)."""

    height: int
    width: int
    top: int
    left: int


def pictures_at_once(pixels: int, most: int | None = None) -> int:
    """How many pictures of `pixels` each fit into one call: as many pixels as one of 1024 px has, and at most `most`."""
    count = max(1, PIXELS_AT_ONCE // pixels)
    return count if most is None else min(count, most)


@functools.cache
def buckets(native: int, multiple: int) -> tuple[tuple[int, int], ...]:
    """The (height, width) of every bucket of a model, from the widest to the tallest.

    Args:
        native: side of the model's square picture.
        multiple: every side is a multiple of this (pixels per token).

    For 512, 1024, 2048 and 4096 px with multiples of 32 these are the published tables; for others the same shapes,
    scaled and rounded.

    Raises:
        ValueError: if `native` is not a positive multiple of `multiple`.
    """
    if multiple < 1 or native < multiple or native % multiple:
        raise ValueError(
            f"the native side must be a positive multiple of {multiple} pixels per token, got: {native}"
        )
    shapes = [*_WIDE, *_TALL]
    if native >= _LARGE_NATIVE:
        shapes += [*_EXTRA_WIDE, *_EXTRA_TALL]
    shapes.sort(key=lambda shape: shape[0] / shape[1])
    scaled = ((_to_multiple(h * native, multiple), _to_multiple(w * native, multiple)) for h, w in shapes)
    return tuple(dict.fromkeys(scaled))  # small models round several shapes to one


def _to_multiple(sixteenths: int, multiple: int) -> int:
    """The multiple nearest to sixteenths / 16, at least one; halves are rounded up."""
    doubled = 2 * BUCKET_UNITS * multiple
    return multiple * max(1, (2 * sixteenths + BUCKET_UNITS * multiple) // doubled)


def nearest_bucket(height: int, width: int, native: int, multiple: int) -> tuple[int, int]:
    """The bucket of the nearest aspect ratio, as published: the first of the smallest distance in height / width."""
    ratio = height / width
    labels = _ratio_labels(native, multiple)
    return buckets(native, multiple)[min(range(len(labels)), key=lambda i: abs(labels[i] - ratio))]


@functools.cache
def _ratio_labels(native: int, multiple: int) -> list[float]:
    """The keys of the published tables: height / width rounded to two decimals."""
    return [round(height / width, 2) for height, width in buckets(native, multiple)]


def plan_size(
    height: int | None, width: int | None, *, native: int, multiple: int, use_binning: bool = True
) -> Size:
    """The model's size for a request.

    Args:
        height, width: requested; None for `native`.
        native: side of the model's square picture.
        multiple: pixels per token.
        use_binning: use the nearest bucket, to be resized; False uses the requested size itself.

    Raises:
        ValueError: for sides that are not whole numbers from 1 up, and without binning for sides that are not
            multiples of `multiple`.
    """
    height = _side("height", native if height is None else height)
    width = _side("width", native if width is None else width)
    if use_binning:
        return Size(height, width, *nearest_bucket(height, width, native, multiple))
    for name, side in (("height", height), ("width", width)):
        if side % multiple:
            below = side - side % multiple
            near = " or ".join(str(value) for value in (below, below + multiple) if value)
            raise ValueError(
                f"{name} must be a multiple of {multiple} when use_resolution_binning is False, such as {near}; "
                f"got: {side}"
            )
    return Size(height, width, height, width)


def _side(name: str, value: int) -> int:
    try:
        side = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number of pixels, got: {value!r}") from None
    if side < 1:
        raise ValueError(f"{name} must be at least 1 pixel, got: {side}")
    return side


def cover(height: int, width: int, out_height: int, out_width: int) -> ResizeCrop:
    """The uniform scaling and centre crop with which a picture of (height, width) fills (out_height, out_width).

    One side fits exactly and the other is rounded down, as published, but in whole numbers: so it is never short. (By the
    published arithmetic in floats 480x640 comes out one pixel high.)
    """
    if out_height * width >= out_width * height:  # the height decides the scale
        resized = (out_height, width * out_height // height)
    else:
        resized = (height * out_width // width, out_width)
    return ResizeCrop(*resized, (resized[0] - out_height) // 2, (resized[1] - out_width) // 2)
