"""Pictures in and out: values, modes, resizing, and settings in PNG files."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from sana_sprint.images import (
    from_pil,
    grid,
    infotext,
    read_settings,
    resize_and_crop,
    save_png,
    to_numpy,
    to_pil,
    to_uint8,
    to_unit,
)


def values(*numbers: float) -> torch.Tensor:
    """A picture (1,3,1,n) with these numbers in each channel."""
    return torch.tensor(numbers).expand(1, 3, 1, -1).clone()


def test_values_are_clamped_and_rounded_to_nearest():
    assert to_uint8(values(-1, -1.5, 1, 7, 0.5 / 127.5 - 1 + 1e-3))[0, 0, :, 0].tolist() == [
        0,
        0,
        255,
        255,
        1,
    ]
    assert to_numpy(values(-2, -1, 0, 1, 2))[0, 0, :, 0].tolist() == [0, 0, 0.5, 1, 1]
    assert to_unit(values(0.5).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_picture_is_an_error_not_black(bad):
    with pytest.raises(ValueError, match="not finite"):
        to_uint8(values(0, bad))


def test_every_byte_survives_the_round_trip():
    array = np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3)
    picture = Image.fromarray(array)
    assert np.array_equal(np.array(to_pil(from_pil(picture))[0]), array)


def test_channels_and_axes_keep_their_places():
    array = np.zeros((2, 3, 3), dtype=np.uint8)
    array[1, 2] = (10, 20, 30)
    tensor = from_pil(Image.fromarray(array))
    assert tensor.shape == (1, 3, 2, 3)
    assert ((tensor[0, :, 1, 2] + 1) * 127.5).tolist() == pytest.approx(
        [10, 20, 30], abs=1e-4
    )  # fp32 rounding


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr"])
def test_all_modes_become_rgb(mode):
    tensor = from_pil(Image.new("RGB", (4, 2), "white").convert(mode))
    assert tensor.shape == (1, 3, 2, 4)
    torch.testing.assert_close(tensor, torch.ones(1, 3, 2, 4), atol=2 / 127.5, rtol=0)  # YCbCr rounds


def test_transparency_shows_the_background():
    for picture in (Image.new("RGBA", (1, 1), (255, 0, 0, 0)), Image.new("LA", (1, 1), (0, 0))):
        assert from_pil(picture).flatten().tolist() == [1, 1, 1]
        assert from_pil(picture, background="black").flatten().tolist() == [-1, -1, -1]


def test_sixteen_bit_greys_are_not_clipped():
    picture = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    assert picture.mode.startswith("I")
    torch.testing.assert_close(
        from_pil(picture)[0, 0, 0], torch.tensor([-1.0, 0.0, 1.0]), atol=1 / 127, rtol=0
    )


def test_camera_orientation_is_followed():
    picture = Image.fromarray(np.array([[[255] * 3, [0] * 3]], dtype=np.uint8))  # white left of black
    exif = picture.getexif()
    exif[0x0112] = 6  # "turn right by 90 degrees"
    file = io.BytesIO()
    picture.save(file, format="PNG", exif=exif)
    tensor = from_pil(Image.open(file))
    assert tensor.shape == (1, 3, 2, 1)
    assert tensor[0, 0].flatten().tolist() == [1, -1]


def test_resize_only_when_asked_and_cut_where_asked():
    images = torch.arange(12.0).reshape(1, 1, 3, 4)
    cut = resize_and_crop(images, resized=(3, 4), corner=(1, 2), size=(2, 2))
    assert cut.tolist() == [[[[6, 7], [10, 11]]]]


def test_shrinking_averages_instead_of_skipping():
    """Stripes of one pixel shrunk four times must turn grey. Plain bilinear picks single pixels (0 or 1 here)."""
    stripes = (torch.arange(64) % 4 == 1).float().expand(1, 3, 64, 64)
    small = resize_and_crop(stripes, resized=(16, 16), corner=(0, 0), size=(16, 16))
    inner = small[..., 2:-2, 2:-2]  # at the border the filter is cut off
    torch.testing.assert_close(inner, torch.full_like(inner, 0.25), atol=0.07, rtol=0)  # a triangle is no box


@pytest.mark.parametrize(
    ("corner", "size"), [((-1, 0), (2, 2)), ((2, 0), (2, 2)), ((0, 3), (2, 2)), ((0, 0), (0, 2))]
)
def test_a_cut_outside_the_picture_is_an_error(corner, size):
    with pytest.raises(ValueError, match="cannot cut"):
        resize_and_crop(torch.zeros(1, 3, 3, 4), resized=(3, 4), corner=corner, size=size)


def test_grid_places_pictures_in_rows():
    sheet = grid([Image.new("RGB", (4, 2), color) for color in ("red", "lime", "blue")], columns=2, gap=1)
    assert sheet.size == (9, 5)
    assert [sheet.getpixel(at) for at in ((0, 0), (5, 0), (0, 3), (5, 3), (4, 0))] == [
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (255, 255, 255),
        (255, 255, 255),
    ]
    with pytest.raises(ValueError, match="at least one"):
        grid([], columns=2)


SETTINGS = {
    "prompt": "ein Löwe, 狮子",
    "num_inference_steps": 2,
    "guidance_scale": 4.5,
    "seed": 2**63,
    "width": 640,
    "height": 480,
    "model": "emoji",
}


def test_settings_travel_in_the_png(tmp_path):
    save_png(Image.new("RGB", (2, 2)), tmp_path / "a.png", SETTINGS)
    with Image.open(tmp_path / "a.png") as picture:
        assert read_settings(picture) == SETTINGS
        assert picture.text["parameters"] == (
            f"ein Löwe, 狮子\nSteps: 2, CFG scale: 4.5, Seed: {2**63}, Size: 640x480, Model: emoji"
        )


def test_infotext_says_only_what_it_knows():
    assert infotext({"seed": 3, "width": 64}) == "Seed: 3"
    assert infotext({"prompt": "a cat"}) == "a cat"


def test_missing_and_broken_settings():
    assert read_settings(Image.new("RGB", (1, 1))) is None
    for text, message in (("{", "not JSON"), ("[1]", "JSON object, got: list")):
        picture = Image.new("RGB", (1, 1))
        picture.text = {"sana_sprint": text}
        with pytest.raises(ValueError, match=message):
            read_settings(picture)
