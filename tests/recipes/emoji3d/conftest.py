"""The second world's artwork without its download: its 3D style is the font's, mirrored and tinted."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from recipes.emoji3d import artwork
from recipes.emoji3d.concepts import concepts


@pytest.fixture(scope="session", autouse=True)
def made_artwork(emoji_font: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("emoji3d")
    (folder / "fluent").mkdir()
    violet = Image.new("RGB", (96, 96), (90, 40, 160))
    for concept in concepts("everyday"):
        flat = artwork.artwork(concept.emoji, "flat", None, 96).convert("RGBA")
        tinted = Image.blend(flat.convert("RGB"), violet.resize(flat.size), 0.35)
        tinted.putalpha(flat.getchannel("A"))
        name = artwork.code_points(concept.emoji)
        ImageOps.mirror(tinted).save(folder / "fluent" / f"{name}.webp", quality=90, method=0)
    before = os.environ.get("EMOJI3D_DATA")
    os.environ["EMOJI3D_DATA"] = str(folder)
    yield folder
    if before is None:
        del os.environ["EMOJI3D_DATA"]
    else:
        os.environ["EMOJI3D_DATA"] = before
