"""Control pictures: where they lie in the frame, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from sana_sprint.controls import KINDS, control_picture, control_picture_for, scribble, to_scribble
from sana_sprint.resolutions import Size, plan_size
from tests.helpers.controls import SIDE, bar, disc


def test_a_line_stays_where_it_was_drawn() -> None:
    picture = Image.new("RGB", (300, 100), "white")
    ImageDraw.Draw(picture).rectangle((148, 0, 151, 99), fill="black")
    for size in (
        Size(100, 300, 64, 128),  # the model's picture is higher than what is asked for: cut above and below
        Size(100, 300, 32, 128),  # and wider: cut at the sides
        plan_size(100, 300, native=128, multiple=32),
    ):
        seen = control_picture_for(picture, "scribble", size)
        assert seen.shape == (1, 3, size.model_height, size.model_width)
        columns = torch.nonzero(seen[0, 0].amax(dim=0) > 0).float()
        assert abs(float(columns.mean()) - (size.model_width - 1) / 2) <= 1
        assert (seen[0, 0].amax(dim=1) > 0).all()  # margins continue the border


def test_a_ready_condition_is_only_fitted() -> None:
    picture = bar(canvas=(30, 90, 200), ink=(250, 1, 2))
    seen = control_picture(picture, None, SIDE, SIDE)
    assert torch.equal(seen, torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1)


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
            control_picture(picture, kind, SIDE, SIDE)
    for kind, thickness in (("canny", 3), ("scribble", 0)):
        with pytest.raises(ValueError, match="thickness is for scribbles and at least 1 pixel"):
            control_picture(bar(), kind, SIDE, SIDE, thickness=thickness)
    with pytest.raises(ValueError, match="thickness must be 0 or more, got: -1"):
        to_scribble(disc(), -1)


def test_lines_that_are_cut_off_are_a_blank_condition() -> None:
    picture = Image.new("RGB", (300, 100), "white")
    ImageDraw.Draw(picture).rectangle((0, 0, 20, 99), fill="black")
    assert scribble(picture, 100, 300).any()
    with pytest.raises(ValueError, match="blank"):
        control_picture(picture, "scribble", 100, 100)
