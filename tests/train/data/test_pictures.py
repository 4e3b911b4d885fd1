"""Any picture to upright RGB of the wanted size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sana_sprint.train.data import fit, pictures
from sana_sprint.train.data.pictures import decode
from sana_sprint.train.data.prefetch import NUM_THREADS, read_ahead
from sana_sprint.train.data.readers.base import Record
from tests.helpers.data import encoded

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def decoded(picture: Image.Image, kind: str = "PNG", **settings: object) -> np.ndarray:
    return decode(Record("a picture", encoded(picture, kind, **settings), ()))


def half_and_half() -> Image.Image:
    """Wide: red on the left, blue on the right."""
    picture = Image.new("RGB", (8, 4), RED)
    picture.paste(BLUE, (4, 0, 8, 4))
    return picture


def test_the_cameras_orientation_is_followed() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: what is left comes on top
    turned = decoded(half_and_half(), exif=exif)
    assert turned.shape == (8, 4, 3)
    assert (tuple(turned[0, 0]), tuple(turned[-1, 0])) == (RED, BLUE)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    picture = (
        Image.new("I;16", (3, 2), 65535) if mode == "I;16" else Image.new("RGB", (3, 2), WHITE).convert(mode)
    )
    array = decoded(picture)
    assert (array.shape, array.dtype) == ((2, 3, 3), np.uint8)
    assert array.min() == 255


def test_cmyk_and_what_is_transparent() -> None:
    assert decoded(Image.new("RGB", (3, 2), WHITE).convert("CMYK"), "TIFF").min() == 255
    half = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    half.putpixel((1, 0), (0, 0, 0, 0))
    assert decoded(half).tolist() == [[[0, 0, 0], [255, 255, 255]]]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([0, 0, 0])
    assert decoded(palette, transparency=0).max() == 255


def test_shrinking_averages_fine_lines() -> None:
    lines = np.zeros((64, 64, 3), np.uint8)
    lines[:, ::2] = 255
    small = fit(lines, 8, 8)
    # Without antialiasing every column would be 0 or 255; the mean is 127.5, borders see one line more or less.
    assert np.abs(small.astype(int) - 127).max() < 16


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 8), (4, 16), (31, 7), (13, 13)])
def test_the_centre_is_kept_and_nothing_is_stretched(height: int, width: int) -> None:
    """A picture whose colour is its place: red grows to the right, green downwards, around the centre."""
    rows, columns = np.mgrid[0:24, 0:36]
    ramp = np.stack([columns * 7, rows * 7, np.full_like(rows, 9)], axis=2).astype(np.uint8)
    fitted = fit(ramp, height, width).astype(float)
    assert fitted.shape == (height, width, 3)
    # Pixel centres of the result, in the picture's coordinates: one scale for both directions, centre on centre.
    scale = min(24 / height, 36 / width)
    x = 18 + (np.arange(width) + 0.5 - width / 2) * scale - 0.5
    y = 12 + (np.arange(height) + 0.5 - height / 2) * scale - 0.5
    inner = np.s_[
        height // 4 : -(height // 4), width // 4 : -(width // 4)
    ]  # the filter is cut off at borders
    # A linear ramp is kept by any symmetric filter; two roundings to whole numbers are off by at most 1 together.
    assert np.abs(fitted[..., 0] - 7 * x[None, :])[inner].max() <= 1
    assert np.abs(fitted[..., 1] - 7 * y[:, None])[inner].max() <= 1


def test_a_picture_of_the_right_size_is_untouched() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    assert fit(picture, 5, 7) is picture


def test_a_batch() -> None:
    samples = {i: (np.full((4, 4 + 4 * i, 3), 51 * i, np.uint8), (str(i),)) for i in range(3)}
    batch, captions = pictures(samples.__getitem__, [1, 1])
    assert batch.shape == (2, 3, 4, 8)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(batch, torch.full_like(batch, 51 / 127.5 - 1))
    assert captions == [("1",), ("1",)]
    with pytest.raises(ValueError, match="one size, got 4x4, 8x4, 12x4: set a size"):
        pictures(samples.__getitem__, range(3))


def test_reading_ahead_keeps_order_and_few_pictures() -> None:
    started: list[int] = []

    def read(position: int) -> int:
        started.append(position)
        return position

    results = read_ahead(read, range(100))
    assert next(results) == 0
    assert len(started) <= 2 * NUM_THREADS
    assert list(results) == list(range(1, 100))
    assert list(read_ahead(read, [])) == []


def test_an_error_met_ahead_is_raised_in_its_turn() -> None:
    def read(position: int) -> int:
        if position == 3:
            raise ValueError("the fourth")
        return position

    results = read_ahead(read, range(100))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="the fourth"):
        next(results)
