"""Control pictures made by a network of another package."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sana_sprint.controls import control_picture
from sana_sprint.controls.annotators import load_annotator
from sana_sprint.images import to_rgb
from tests.helpers.controls import SIDE, bar


def test_a_missing_annotator_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    load_annotator.cache_clear()
    monkeypatch.setitem(sys.modules, "controlnet_aux", None)
    with pytest.raises(
        ValueError, match=r"'depth' needs controlnet-aux: pip install 'sana-sprint\[control\]'"
    ):
        control_picture(bar(), "depth", SIDE, SIDE)


def test_annotators_see_the_upright_picture_and_hed_becomes_a_scribble(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load_annotator.cache_clear()
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
    found = control_picture(bar("LA", (0, 0), (0, 255)), "depth", 256, 256)
    assert seen[0].mode == "RGB"
    assert (np.asarray(seen[0]) == np.asarray(to_rgb(bar()))).all()
    assert len(found.unique()) > 2  # as the detector gave it
    assert set(control_picture(bar(), "hed", 256, 256).unique().tolist()) == {-1.0, 1.0}
    load_annotator.cache_clear()
