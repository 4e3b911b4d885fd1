"""Control pictures: white lines on black, or the output of an annotator, from a picture of any kind.

A branch is trained on control pictures of one look, so a sketch of any colours, canvas and size is converted to that look.
Unreadable, blank and tiny pictures raise ValueError: a branch could not follow them.

A control picture is (1,3,H,W) in [-1,1].
"""

from __future__ import annotations

import os

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from sana_sprint.controls.annotators import annotate
from sana_sprint.controls.edges import canny, soft_edges
from sana_sprint.controls.kinds import ANNOTATORS, MIN_CONTRAST, BlankPictureError, check_kind
from sana_sprint.controls.scribble import redraw, scribble, to_scribble
from sana_sprint.images import from_pil, read_picture, resize_to_cover
from sana_sprint.resolutions import Size, cover

Picture = Image.Image | str | os.PathLike[str]

MIN_SIDE = 8  # pixels; smaller pictures hold no sketch
LUMA = (0.299, 0.587, 0.114)


def control_picture_for(
    picture: Picture,
    kind: str | None,
    size: Size,
    *,
    thickness: int | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """The control picture (1,3,model_height,model_width) in [-1,1] for a call that draws `size`.

    The model's picture is resized and cropped to the requested size (`resolutions.cover`). The control picture fills the
    part that remains, so that lines stay where they were drawn, and its border is repeated over the margins.
    Arguments and errors are those of `control_picture`; `thickness` is in pixels of the model.
    """
    full_height, full_width = size.model_height, size.model_width
    plan = cover(full_height, full_width, size.height, size.width)
    down, across = full_height / plan.height, full_width / plan.width  # the model's pixels per one asked for
    height, width = max(1, round(size.height * down)), max(1, round(size.width * across))
    top, left = (
        min(round(plan.top * down), full_height - height),
        min(round(plan.left * across), full_width - width),
    )
    seen = control_picture(picture, kind, height, width, thickness=thickness, device=device)
    margins = (left, full_width - width - left, top, full_height - height - top)
    return F.pad(seen, margins, mode="replicate")


def control_picture(
    picture: Picture,
    kind: str | None,
    height: int,
    width: int,
    *,
    thickness: int | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """The control picture (1,3,height,width) in [-1,1] of a picture.

    The picture is scaled uniformly until it covers the size, and cropped around its centre.

    Args:
        picture: of any mode and size, or the path of one. Its EXIF orientation is applied; transparency is canvas.
        kind: "scribble" (drawn lines, dark on light or light on dark), "canny" (edges), "softedge" (smooth edges), one of
            `ANNOTATORS`, which need the package controlnet-aux, or None: the picture already is a control picture.
        height, width: in pixels.
        thickness: width of a scribble's lines in pixels of the result; None keeps them as drawn.
        device: of the computation and the result; None for the CPU.

    Raises:
        ValueError: for an unknown kind, a picture that cannot be read, and a package not installed.
        BlankPictureError: the picture has no lines or edges.
    """
    check_kind(kind, thickness)
    source = open_picture(picture)
    if kind == "scribble":
        lines = scribble(source, height, width, device=device)
        return _as_picture(lines if thickness is None else redraw(lines, thickness))
    if kind in ANNOTATORS:
        found = resize_to_cover(from_pil(annotate(source, kind), device=device), height, width)
        return _as_picture(to_scribble(_luma(found), 1)) if kind == "hed" else _not_blank(found)
    seen = resize_to_cover(from_pil(source, device=device), height, width)
    if kind is None:
        return _not_blank(seen)
    edges = {"canny": canny, "softedge": soft_edges}[kind]
    return _as_picture(edges(_luma(seen)))


def open_picture(picture: Picture) -> Image.Image:
    """A picture, read in full and upright. Raises ValueError if it cannot be read or has a side below 8 pixels."""
    if isinstance(picture, str | os.PathLike):
        picture = read_picture(picture)
    if not isinstance(picture, Image.Image):
        raise ValueError(f"image must be a PIL picture or the path of a file, got: {type(picture).__name__}")
    if min(picture.size) < MIN_SIDE:
        width, height = picture.size
        raise ValueError(f"the picture is {width}x{height} pixels; each side must have at least {MIN_SIDE}")
    return ImageOps.exif_transpose(picture)


def _luma(picture: Tensor) -> Tensor:
    """(1,3,H,W) in [-1,1] -> brightness (H,W) in [0,1]."""
    weights = picture.new_tensor(LUMA)[:, None, None]
    return (picture[0] * weights).sum(dim=0).add(1).div(2).clamp(0, 1)


def _as_picture(lines: Tensor) -> Tensor:
    return _not_blank(lines[None, None].expand(1, 3, -1, -1).mul(2).sub(1))


def _not_blank(picture: Tensor) -> Tensor:
    span = picture.amax(dim=(2, 3)) - picture.amin(dim=(2, 3))
    if float(span.max()) < 2 * MIN_CONTRAST:
        raise BlankPictureError("the picture is blank: it has no lines or edges to follow")
    return picture
