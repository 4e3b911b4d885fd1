"""Kinds of control picture, and the contrast below which one is blank."""

from __future__ import annotations


class BlankPictureError(ValueError):
    """A picture without lines or edges to follow."""


MIN_CONTRAST = 24 / 255  # of ink to its canvas; compression alone makes a tenth of full contrast at most
# Class in controlnet_aux of each kind that needs it.
ANNOTATORS = {
    "hed": "HEDdetector",
    "depth": "MidasDetector",
    "lineart": "LineartDetector",
    "mlsd": "MLSDdetector",
    "normal": "NormalBaeDetector",
    "openpose": "OpenposeDetector",
    "pidi": "PidiNetDetector",
}
# Kinds that need no other library, and what a page says that a picture of each is.
BUILT_IN = {
    "scribble": "Drawn lines",
    "canny": "A picture: its edges",
    "softedge": "A picture: soft edges",
}
KINDS = (*BUILT_IN, *ANNOTATORS)


def check_kind(kind: str | None, thickness: int | None = None) -> None:
    """Raise ValueError for an unknown kind, a thickness below 1, and a thickness for a kind without lines to redraw."""
    if kind is not None and kind not in KINDS:
        raise ValueError(
            f"kind must be one of {', '.join(KINDS)}, or None for a ready control picture; got: {kind!r}"
        )
    if thickness is not None and (kind != "scribble" or thickness < 1):
        raise ValueError(f"thickness is for scribbles and at least 1 pixel, got: {thickness} for {kind!r}")
