"""Control pictures made by networks of the package controlnet-aux."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from PIL import Image

from sana_sprint.controls.kinds import ANNOTATORS
from sana_sprint.images import to_rgb

ANNOTATOR_WEIGHTS = "lllyasviel/Annotators"


def annotate(picture: Image.Image, kind: str) -> Image.Image:
    """The annotator's output for a picture; its weights are downloaded from the Hub on first use."""
    found = load_annotator(kind)(to_rgb(picture))
    assert isinstance(found, Image.Image)
    return found


@functools.cache
def load_annotator(kind: str) -> Callable[[Image.Image], Any]:
    """The annotator of this kind, loaded once. Raises ValueError if its package is not installed."""
    try:
        import controlnet_aux
    except ImportError as error:
        raise ValueError(
            f"the control kind {kind!r} needs controlnet-aux: pip install 'sana-sprint[control]'"
        ) from error
    made: Callable[[Image.Image], Any] = getattr(controlnet_aux, ANNOTATORS[kind]).from_pretrained(
        ANNOTATOR_WEIGHTS
    )
    return made
