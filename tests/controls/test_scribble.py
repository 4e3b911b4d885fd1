"""Scribbles: drawings of any look, and soft edges, become lines in the look that a control branch knows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from sana_sprint.controls import blur, dilate, open_picture, redraw, to_scribble
from tests.helpers.controls import EXPECTED, SIDE, bar, lines_of

palette = bar("RGB").quantize(2)
transparent_palette = bar("RGBA", (0, 0, 0, 0), "black").quantize(3)
sixteen_bit = Image.fromarray((np.asarray(bar("L")).astype(np.uint16)) * 257)
INKED: dict[str, Image.Image] = {
    "dark on light": bar(),
    "light on dark": bar(canvas="black", ink="white"),
    "yellow on white": bar(canvas="white", ink="yellow"),
    "red on green": bar(canvas=(0, 150, 0), ink=(150, 0, 0)),
    "pencil grey": bar(canvas=(240, 238, 230), ink=(170, 170, 170)),
    "1": bar("1", 1, 0),
    "L": bar("L", 255, 0),
    "P": palette,
    "P, transparent": transparent_palette,
    "LA": bar("LA", (0, 0), (0, 255)),
    "black ink on glass": bar("RGBA", (255, 255, 255, 0), "black"),
    "white ink on glass": bar("RGBA", (0, 0, 0, 0), "white"),
    "I;16": sixteen_bit,
    "I": Image.fromarray(np.asarray(sixteen_bit).astype(np.int32)),
    "CMYK": bar().convert("CMYK"),
    "YCbCr": bar().convert("YCbCr"),
    "HSV": bar().convert("HSV"),
}


@pytest.mark.parametrize("name", INKED)
def test_a_drawing_of_any_look_becomes_white_lines_on_black(name: str) -> None:
    assert torch.equal(lines_of(INKED[name]), EXPECTED)


def test_the_orientation_note_is_followed(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    bar().rotate(90).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(lines_of(tmp_path / "turned.png"), EXPECTED)
    assert torch.equal(lines_of(open_picture(tmp_path / "turned.png")), EXPECTED)  # not turned twice


def test_noise_of_compression_is_no_ink(tmp_path: Path) -> None:
    bar().save(tmp_path / "sketch.jpg", quality=50)
    found = lines_of(tmp_path / "sketch.jpg")
    assert (found & ~dilate(EXPECTED.float(), 3).bool()).sum() == 0
    assert (EXPECTED & ~found).sum() == 0


@pytest.mark.parametrize("size", [16, 100, 1000, 3000])
def test_any_size_fits_and_thin_lines_survive(size: int) -> None:
    found = lines_of(bar(size=size, width=max(1, size // 500)))
    columns = found[:30].sum(dim=0) > 0
    middle = torch.nonzero(columns).float().mean()
    # The stroke is centred at a quarter of the width; a small picture's pixel is 4 wide.
    assert abs(float(middle) - 15.5) <= 2.5
    assert found[:30].any(dim=1).all()  # in every row: unbroken
    assert not found[36:].any()


def test_what_stands_over_is_cut_off_evenly() -> None:
    wide = Image.new("RGB", (3 * SIDE, SIDE), "white")
    wide.paste(bar(), (SIDE, 0))
    assert torch.equal(lines_of(wide), EXPECTED)


@pytest.mark.parametrize("thickness", [1, 3, 6])
def test_thickness_is_what_was_asked_for_whatever_was_drawn(thickness: int) -> None:
    for width in (1, 3, 8):
        found = lines_of(bar(width=width), thickness=thickness)
        rows = found[12:20].sum(dim=1)
        # The middle of an even width lies between two pixels, and is both of them.
        assert ((rows == thickness) | (rows == thickness + 1)).all(), (width, rows)


def test_redrawn_lines_hang_together() -> None:
    picture = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(picture).ellipse((10, 10, 54, 54), outline=255, width=5)
    ring = redraw(torch.from_numpy(np.array(picture)).float() / 255, 2)
    outside = torch.zeros_like(ring)
    outside[0, 0] = 1
    for _ in range(2 * SIDE):  # flood from a corner: a closed ring keeps it out of the middle
        cross = torch.maximum(dilate(outside.T.contiguous(), 1).T, outside)
        grown = torch.maximum(
            cross, torch.nn.functional.max_pool2d(outside[None, None], (3, 1), 1, (1, 0))[0, 0]
        )
        grown = torch.maximum(
            grown, torch.nn.functional.max_pool2d(outside[None, None], (1, 3), 1, (0, 1))[0, 0]
        )
        outside = torch.minimum(grown, 1 - ring)
    assert outside[SIDE // 2, SIDE // 2] == 0
    assert outside[0].all()


def test_soft_edges_become_hand_drawn_lines_of_the_asked_thickness() -> None:
    edges = torch.zeros(256, 256)
    edges[:, 120:136] = 1  # a thick soft edge
    edges[40, :100] = 0.3  # too faint to be a ridge
    edges = blur(edges, 2.0)
    widths = [int((to_scribble(edges, thickness) > 0)[128].sum()) for thickness in (0, 1, 8, 24)]
    thin, plain, wide, widest = widths
    assert 0 < thin < plain < wide < widest
    assert (wide - plain, widest - plain, plain - thin) == (3, 11, 3)  # kernels of 4, 12 and 4 pixels
    lines = to_scribble(edges, 1)
    assert set(lines.unique().tolist()) == {0.0, 1.0}
    assert not lines[40, :90].any()
    middle = torch.nonzero(lines[128]).float().mean()
    assert abs(float(middle) - 127.5) <= 1
