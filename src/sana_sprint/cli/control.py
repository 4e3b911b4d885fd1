"""`sana-sprint control`: `generate` with a picture to follow, under the name that it had before."""

from __future__ import annotations

from functools import wraps
from typing import Any

from sana_sprint.cli.common import UsageError
from sana_sprint.cli.control_picture import IMAGE_HINT
from sana_sprint.cli.generate import generate


@wraps(generate)  # its options and their help
def control(**arguments: Any) -> None:
    if arguments["image"] is None:
        raise UsageError("--image is missing: the picture to follow", hint=IMAGE_HINT)
    generate(**arguments)


control.__doc__ = """Draw pictures that follow another picture: the same as generate with --image.

Example: sana-sprint control "a red heart" --image sketch.png --kind scribble
"""
