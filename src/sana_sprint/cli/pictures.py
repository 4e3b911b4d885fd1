"""Names of the files that pictures are written to, and writing them with their settings."""

from __future__ import annotations

import io
import itertools
import os
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_sprint.cli.common import UsageError

if TYPE_CHECKING:
    from PIL import Image

MAX_SLUG_BYTES = 60  # leaves room for seed and number in the 255 bytes of a name, and reads well in a list


def slug(prompt: str) -> str:
    """A prompt as part of a file name: letters and digits of any script, joined by hyphens; never empty."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", prompt).lower())
    text = "-".join(words).encode()[:MAX_SLUG_BYTES].decode(errors="ignore")  # may end inside a letter
    return text.strip("-") or "picture"


def check_target(output: Path, count: int) -> None:
    """Raise `UsageError` if `count` pictures cannot be written to `output`, a folder or one .png file."""
    hint = "name a folder, or one .png file for one picture"
    if output.is_dir():
        return
    if output.is_file() and output.suffix.lower() != ".png":
        raise UsageError(f"--output is a file that is no picture: {output}", hint=hint)
    if is_file_target(output):
        if count != 1:
            raise UsageError(f"{count} pictures do not fit into one file: {output}", hint=hint)
        output = output.parent
    elif output.suffix.lower() in {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}:
        raise UsageError(f"pictures are written as .png, got: {output}", hint=hint)
    elif str(output) == "-":
        raise UsageError("pictures cannot be written to stdout", hint=hint)
    for parent in (output, *output.parents):
        if parent.exists():
            if not parent.is_dir():
                raise UsageError(f"not a folder: {parent}", hint=hint)
            if not os.access(parent, os.W_OK):
                raise UsageError(f"no permission to write into {parent}", hint="choose another folder")
            return


def is_file_target(output: Path) -> bool:
    """Whether `output` names one picture rather than a folder of them."""
    return output.suffix.lower() == ".png" and not output.is_dir()


def write_picture(
    picture: Image.Image, output: Path, name: str, settings: Mapping[str, Any], *, replace: bool = False
) -> Path:
    """Save a picture with its settings and return its path.

    Args:
        picture: what to save.
        output: the .png file itself, which is replaced, or a folder, made if absent.
        name: of the file in the folder, without ".png". If it is taken a number is added, unless `replace`.
        settings: see `images.save_png`.
        replace: write over an older file in the folder.
    """
    from sana_sprint.images import save_png

    data = io.BytesIO()  # a picture that cannot be encoded leaves no file
    save_png(picture, data, settings)
    is_file = is_file_target(output)
    path = output if is_file else output / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_file or replace:
        path.write_bytes(data.getvalue())
        return path
    for number in itertools.count(2):
        try:
            with path.open("xb") as file:  # two runs at once do not take the same name
                file.write(data.getvalue())
            break
        except FileExistsError:
            path = output / f"{name}-{number}.png"
    return path
