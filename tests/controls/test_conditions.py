"""Conditions: any picture to lines in the look that a control branch knows, or a clear error."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from sana_sprint.conditions import (
    KINDS,
    blur,
    canny,
    condition,
    condition_for,
    dilate,
    erode,
    open_picture,
    redraw,
    scribble,
    soft_edges,
    to_scribble,
)
from sana_sprint.conditions import _annotator as annotator
from sana_sprint.images import to_rgb
from sana_sprint.resolutions import Size, plan_size

SIDE = 64


def bar(
    mode: str = "RGB", canvas: Any = "white", ink: Any = "black", size: int = SIDE, width: int = 4
) -> Image.Image:
    """A vertical stroke at a quarter of the width, in the upper half."""
    picture = Image.new(mode, (size, size), canvas)
    ImageDraw.Draw(picture).rectangle(
        (size // 4 - width // 2, 0, size // 4 - width // 2 + width - 1, size // 2 - 1), fill=ink
    )
    return picture


def lines_of(picture: Any, kind: str = "scribble", **settings: Any) -> Tensor:
    """The condition's lines (64,64) as booleans."""
    seen = condition(picture, kind, SIDE, SIDE, **settings)
    assert seen.shape == (1, 3, SIDE, SIDE)
    assert torch.equal(seen[:, :1].expand_as(seen), seen)
    return seen[0, 0] > 0


EXPECTED = torch.zeros(SIDE, SIDE, dtype=torch.bool)
EXPECTED[:32, 14:18] = True


# --- Scribbles of any look ----------------------------------------------------------------------------------------

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


# --- Edges --------------------------------------------------------------------------------------------------------


def disc(contrast: float = 1.0) -> Tensor:
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    return (torch.hypot(y - 31.5, x - 31.5) < 20).float() * contrast


def test_canny_draws_one_thin_closed_line_where_the_edge_is() -> None:
    edges = canny(disc())
    y, x = torch.nonzero(edges, as_tuple=True)
    radius = torch.hypot(y - 31.5, x - 31.5)
    assert float((radius - 20).abs().max()) < 1.5  # pixels: the edge is a staircase
    angles = torch.atan2(y - 31.5, x - 31.5).sort().values
    assert float(angles.diff().max()) < 0.15  # no gap: neighbours on this circle are 0.05 to 0.07 apart
    assert edges.sum() < 2 * 2 * torch.pi * 20  # thin


def test_canny_keeps_weak_edges_only_where_they_continue_strong_ones() -> None:
    fading = torch.zeros(SIDE, SIDE)
    fading[:, 32:] = torch.linspace(1, 0.08, SIDE)[:, None]  # its lower end is below the high threshold
    assert canny(fading)[:56].amax(dim=1).all()
    weak = torch.zeros(SIDE, SIDE)
    weak[:, 32:] = 0.2
    assert canny(fading)[50].any()
    assert not canny(weak * 0.8).any()
    assert not canny(torch.full((SIDE, SIDE), 0.5)).any()


def test_soft_edges_are_strongest_at_the_edge_and_fade_beside_it() -> None:
    found = soft_edges(disc(0.3))
    assert float(found.max()) == 1.0  # whatever the contrast
    assert float(found[31, 12]) > 0.9
    assert 0 < float(found[31, 14]) < float(found[31, 13])
    assert float(found[31, 31]) < 1e-6  # rounding of the blur's sums


@pytest.mark.parametrize("kind", ["canny", "softedge"])
def test_edges_of_a_picture_become_a_condition(kind: str) -> None:
    assert lines_of(bar(width=20), kind)[5:25].sum(dim=1).min() >= 2  # both sides of the stroke


# --- Scribbles from soft edges ------------------------------------------------------------------------------------


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


def test_dilation_and_erosion_are_each_others_mirror() -> None:
    dot = torch.zeros(9, 9)
    dot[4, 4] = 1
    assert [int(dilate(dot, size).sum()) for size in (0, 1, 2, 3, 4)] == [1, 1, 4, 9, 16]
    assert torch.equal(erode(dilate(dot, 3), 3), dot)


@pytest.mark.parametrize("size", [2, 3, 4, 7, 24])
@pytest.mark.parametrize("shape", [(31, 40), (5, 64), (1, 1)])
def test_dilation_is_the_largest_value_of_each_square(size: int, shape: tuple[int, int]) -> None:
    picture = torch.randn(shape, generator=torch.Generator().manual_seed(size))
    before = (size - 1) // 2
    for y, x in itertools.product(range(shape[0]), range(shape[1])):
        rows = slice(max(0, y - before), y + size - before)
        square = picture[rows, max(0, x - before) : x + size - before]
        assert dilate(picture, size)[y, x] == square.max()


# --- The model's frame --------------------------------------------------------------------------------------------


def test_a_line_stays_where_it_was_drawn() -> None:
    picture = Image.new("RGB", (300, 100), "white")
    ImageDraw.Draw(picture).rectangle((148, 0, 151, 99), fill="black")
    for size in (
        Size(100, 300, 64, 128),  # the model's picture is higher than what is asked for: cut above and below
        Size(100, 300, 32, 128),  # and wider: cut at the sides
        plan_size(100, 300, native=128, multiple=32),
    ):
        seen = condition_for(picture, "scribble", size)
        assert seen.shape == (1, 3, size.model_height, size.model_width)
        columns = torch.nonzero(seen[0, 0].amax(dim=0) > 0).float()
        assert abs(float(columns.mean()) - (size.model_width - 1) / 2) <= 1
        assert (seen[0, 0].amax(dim=1) > 0).all()  # margins continue the border


def test_a_ready_condition_is_only_fitted() -> None:
    picture = bar(canvas=(30, 90, 200), ink=(250, 1, 2))
    seen = condition(picture, None, SIDE, SIDE)
    assert torch.equal(seen, torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1)


# --- Annotators ---------------------------------------------------------------------------------------------------


def test_a_missing_annotator_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    annotator.cache_clear()
    monkeypatch.setitem(sys.modules, "controlnet_aux", None)
    with pytest.raises(
        ValueError, match=r"'depth' needs controlnet-aux: pip install 'sana-sprint\[control\]'"
    ):
        condition(bar(), "depth", SIDE, SIDE)


def test_annotators_see_the_upright_picture_and_hed_becomes_a_scribble(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    annotator.cache_clear()
    seen = []

    class Detector:
        @classmethod
        def from_pretrained(cls, name: str) -> Detector:
            assert name == "lllyasviel/Annotators"
            return cls()

        def __call__(self, picture: Image.Image) -> Image.Image:
            seen.append(picture)
            edges = np.asarray(bar(canvas="black", ink="white", size=256, width=12))
            return Image.fromarray(edges).resize((128, 128))  # detectors choose their own size

    modules = SimpleNamespace(MidasDetector=Detector, HEDdetector=Detector)
    monkeypatch.setitem(sys.modules, "controlnet_aux", modules)
    found = condition(bar("LA", (0, 0), (0, 255)), "depth", 256, 256)
    assert seen[0].mode == "RGB"
    assert (np.asarray(seen[0]) == np.asarray(to_rgb(bar()))).all()
    assert len(found.unique()) > 2  # as the detector gave it
    assert set(condition(bar(), "hed", 256, 256).unique().tolist()) == {-1.0, 1.0}
    annotator.cache_clear()


# --- Errors -------------------------------------------------------------------------------------------------------


def saved(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_what_says_nothing_is_refused(tmp_path: Path) -> None:
    bar().save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    noise = Image.fromarray(np.random.default_rng(0).integers(245, 256, (SIDE, SIDE, 3), np.uint8))
    cases: list[tuple[Any, str | None, str]] = [
        (tmp_path / "absent.png", None, "cannot read the picture .*absent.png"),
        (saved(tmp_path / "text.png", b"hello"), None, "cannot read"),
        (saved(tmp_path / "empty.png", b""), None, "cannot read"),
        (saved(tmp_path / "cut.png", whole[: len(whole) // 2]), None, "cannot read"),
        (tmp_path, None, "cannot read"),
        (Image.new("RGB", (7, 100), "white"), None, "7x100 pixels; each side must have at least 8"),
        (np.zeros((64, 64, 3)), None, "got: ndarray"),
        (Image.new("RGB", (64, 64), "white"), "scribble", "blank"),
        (Image.new("RGBA", (64, 64), (0, 0, 0, 0)), "scribble", "blank"),
        (noise, "scribble", "blank"),
        *[(Image.new("RGB", (64, 64), "grey"), kind, "blank") for kind in ("canny", "softedge", None)],
        (bar(), "scrible", f"kind must be one of {', '.join(KINDS)}.*'scrible'"),
    ]
    for picture, kind, message in cases:
        with pytest.raises(ValueError, match=message):
            condition(picture, kind, SIDE, SIDE)
    for kind, thickness in (("canny", 3), ("scribble", 0)):
        with pytest.raises(ValueError, match="thickness is for scribbles and at least 1 pixel"):
            condition(bar(), kind, SIDE, SIDE, thickness=thickness)
    with pytest.raises(ValueError, match="thickness must be 0 or more, got: -1"):
        to_scribble(disc(), -1)


def test_lines_that_are_cut_off_are_a_blank_condition() -> None:
    picture = Image.new("RGB", (300, 100), "white")
    ImageDraw.Draw(picture).rectangle((0, 0, 20, 99), fill="black")
    assert scribble(picture, 100, 300).any()
    with pytest.raises(ValueError, match="blank"):
        condition(picture, "scribble", 100, 100)
