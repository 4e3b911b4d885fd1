"""From any picture to what a control branch follows: white lines on black, or what an annotator makes of it.

A branch is trained on conditions of one look, so a user's sketch, whatever its colours, canvas and size, must come to
look like them. What cannot be used (unreadable, blank, tiny) is a ValueError, because its condition would say nothing.

Lines are (H,W) fp32, 1 = line and 0 = none, inside this module; conditions are pictures (1,3,H,W) in [-1,1].
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from sana_sprint.images import from_pil, resize_and_crop, to_rgb
from sana_sprint.resolutions import Size, cover

Picture = Image.Image | str | os.PathLike[str]


class BlankPictureError(ValueError):
    """A picture without lines or edges to follow."""


MIN_SIDE = 8  # pixels; smaller pictures hold no sketch
MIN_CONTRAST = 24 / 255  # of ink to its canvas; compression alone makes a tenth of full contrast at most
INK_SHARE = 0.25  # of the strongest ink's contrast: fainter marks are smudges
LUMA = (0.299, 0.587, 0.114)
# Canny's blur, in pixels, and its thresholds, as shares of the steepest slope there can be.
CANNY_SIGMA, CANNY_LOW, CANNY_HIGH = 1.4, 0.05, 0.12
SOFT_SIGMA = 1.0
# Class in controlnet_aux of each kind that needs it; their weights are found under the name below.
ANNOTATORS = {
    "hed": "HEDdetector",
    "depth": "MidasDetector",
    "lineart": "LineartDetector",
    "mlsd": "MLSDdetector",
    "normal": "NormalBaeDetector",
    "openpose": "OpenposeDetector",
    "pidi": "PidiNetDetector",
}
ANNOTATOR_WEIGHTS = "lllyasviel/Annotators"
KINDS = ("scribble", "canny", "softedge", *ANNOTATORS)


# ----- the whole way --------------------------------------------------------------------------------------------------


def condition_for(
    picture: Picture,
    kind: str | None,
    size: Size,
    *,
    thickness: int | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """The condition (1,3,model_height,model_width) in [-1,1] of a picture that is drawn for `size`.

    The model's picture is resized and cropped to the size asked for (`resolutions.cover`). So only the part that will be
    seen is filled by the condition, and the lines stay where they were drawn; the margins continue its border.
    Arguments and errors are those of `condition`; thickness counts pixels of the model.
    """
    full_height, full_width = size.model_height, size.model_width
    plan = cover(full_height, full_width, size.height, size.width)
    down, across = full_height / plan.height, full_width / plan.width  # the model's pixels per one asked for
    height, width = max(1, round(size.height * down)), max(1, round(size.width * across))
    top, left = (
        min(round(plan.top * down), full_height - height),
        min(round(plan.left * across), full_width - width),
    )
    seen = condition(picture, kind, height, width, thickness=thickness, device=device)
    margins = (left, full_width - width - left, top, full_height - height - top)
    return F.pad(seen, margins, mode="replicate")


def condition(
    picture: Picture,
    kind: str | None,
    height: int,
    width: int,
    *,
    thickness: int | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """A picture's condition (1,3,height,width) in [-1,1].

    The picture is scaled alike in both directions until it covers the size, and its centre is kept.

    Args:
        picture: of any mode and size, or a file of one. Its orientation note is followed; transparency is canvas.
        kind: "scribble" (drawn lines, dark on light or light on dark), "canny" (edges), "softedge" (smooth edges), one of
            `ANNOTATORS`, which need the package controlnet-aux, or None: the picture already is a condition.
        height, width: in pixels.
        thickness: of a scribble's lines, in pixels of the result; None keeps them as drawn.
        device: where it is made; None for the CPU.

    Raises:
        ValueError: for an unknown kind, a picture that cannot be read, and a package not installed.
        BlankPictureError: the picture says nothing.
    """
    check_kind(kind, thickness)
    source = open_picture(picture)
    if kind == "scribble":
        lines = scribble(source, height, width, device=device)
        return _as_picture(lines if thickness is None else redraw(lines, thickness))
    if kind in ANNOTATORS:
        found = _fitted(from_pil(annotate(source, kind), device=device), height, width)
        return _as_picture(to_scribble(_luma(found), 1)) if kind == "hed" else _not_blank(found)
    fitted = _fitted(from_pil(source, device=device), height, width)
    if kind is None:
        return _not_blank(fitted)
    edges = {"canny": canny, "softedge": soft_edges}[kind]
    return _as_picture(edges(_luma(fitted)))


def check_kind(kind: str | None, thickness: int | None = None) -> None:
    """Raise ValueError for an unknown kind, and for a thickness that is none or that it has no use for."""
    if kind is not None and kind not in KINDS:
        raise ValueError(
            f"kind must be one of {', '.join(KINDS)}, or None for a ready condition; got: {kind!r}"
        )
    if thickness is not None and (kind != "scribble" or thickness < 1):
        raise ValueError(f"thickness is for scribbles and at least 1 pixel, got: {thickness} for {kind!r}")


def open_picture(picture: Picture) -> Image.Image:
    """The picture, read whole and the right way up. Raises ValueError if that fails or it is smaller than 8 pixels."""
    if isinstance(picture, str | os.PathLike):
        picture = _read(picture)
    if not isinstance(picture, Image.Image):
        raise ValueError(f"image must be a PIL picture or the path of a file, got: {type(picture).__name__}")
    if min(picture.size) < MIN_SIDE:
        width, height = picture.size
        raise ValueError(f"the picture is {width}x{height} pixels; each side must have at least {MIN_SIDE}")
    return ImageOps.exif_transpose(picture)


def _read(path: str | os.PathLike[str]) -> Image.Image:
    try:
        with Image.open(path) as opened:
            opened.load()
            return opened
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the picture {os.fspath(path)}: {error}") from error


def _fitted(images: Tensor, height: int, width: int) -> Tensor:
    plan = cover(images.shape[-2], images.shape[-1], height, width)
    return resize_and_crop(
        images, resized=(plan.height, plan.width), corner=(plan.top, plan.left), size=(height, width)
    )


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


# ----- scribbles ------------------------------------------------------------------------------------------------------


def scribble(picture: Image.Image, height: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Lines (height,width) of a drawing: whatever differs from its canvas, the most frequent colour.

    Raises BlankPictureError if nothing does, on a white or on a black ground where it is transparent.
    """
    for background in ("white", "black"):  # strokes may be as white as the first
        ink = _ink(from_pil(picture, background=background, device=device))
        if float(ink.max()) >= MIN_CONTRAST:
            break
        if not picture.has_transparency_data:
            break
    strongest = float(ink.max())
    if strongest < MIN_CONTRAST:
        raise BlankPictureError("the picture is blank: draw lines on it")
    lines = (ink > max(INK_SHARE * strongest, MIN_CONTRAST / 2)).float()
    # Widened first, so that no line becomes thinner than a pixel where the picture shrinks.
    shrinking = min(lines.shape[0] / height, lines.shape[1] / width)
    lines = dilate(lines, math.ceil(shrinking))
    return (_fitted(lines[None, None], height, width)[0, 0] > 0.5).float()


def _ink(picture: Tensor) -> Tensor:
    """(1,3,H,W) in [-1,1] -> contrast to the canvas, (H,W) in [0,1]: the largest over the colours, so that yellow counts."""
    canvas = _median(picture[0].flatten(1))[:, None, None]
    return (picture[0] - canvas).abs().amax(dim=0) / 2


def _median(rows: Tensor) -> Tensor:
    """The median of each row, (C,N) -> (C,); of an even number the lower one."""
    if rows.is_cuda:  # where `median` gives each row one of a hundred multiprocessors
        return rows.sort(dim=1).values[:, (rows.shape[1] - 1) // 2]
    return rows.median(dim=1).values


def redraw(lines: Tensor, thickness: int) -> Tensor:
    """Lines (H,W) of any width with the same middle and `thickness` pixels, one more where that is between two."""
    middle = torch.zeros_like(lines)
    while lines.any():  # the morphological skeleton: what an opening removes at each erosion
        smaller = erode(lines, 3)
        middle = torch.maximum(middle, lines - torch.minimum(lines, dilate(smaller, 3)))
        lines = smaller
    # The skeleton has gaps of a pixel, which the first 3 x 3 closes.
    return dilate(erode(dilate(middle, 3), 3), thickness)


def to_scribble(edges: Tensor, thickness: int, *, sigma: float = 3.0) -> Tensor:
    """Soft edges (H,W) in [0,1], of a HED network, to lines that look drawn by hand: 1 and 0.

    Only ridges are kept and then smeared, as in the published control data (NVlabs/Sana), whose lines `thickness` varies: 0
    thins them by a 4 x 4 erosion, 1 leaves them, 2 and up widen them by half of it, in pixels. `sigma` (pixels) is the
    published one for pictures of 1024 px.

    Raises ValueError for a negative thickness.
    """
    if thickness < 0:
        raise ValueError(f"thickness must be 0 or more, got: {thickness}")
    smooth = blur(edges, sigma)
    ridge = torch.zeros_like(edges, dtype=torch.bool)
    for kernel in _LINES:
        windows = F.unfold(_padded(smooth, 1), 3)[0].view(9, *edges.shape)
        ridge |= smooth >= windows[list(kernel)].amax(dim=0)
    ridge &= smooth > 127 / 255
    lines = (blur(ridge.float(), sigma) > 4 / 255).float()
    if thickness == 0:
        return erode(lines, 4)
    return dilate(lines, thickness // 2) if thickness > 1 else lines


# The cells of a 3 x 3 window, numbered row by row, that lie on each of four lines through its middle.
_LINES = ((3, 4, 5), (1, 4, 7), (0, 4, 8), (2, 4, 6))


# ----- edges ----------------------------------------------------------------------------------------------------------


def canny(grey: Tensor) -> Tensor:
    """Edges one pixel wide (Canny 1986) of a brightness (H,W) in [0,1]: the ridges of its slope, strong ones and what hangs
    together with them."""
    dx, dy = _slopes(blur(grey, CANNY_SIGMA))
    slope = torch.hypot(dx, dy)
    windows = F.unfold(_padded(slope, 1), 3)[0].view(9, *grey.shape)
    # The neighbours across the edge: 0 for a slope along x, 1 down-right, 2 along y, 3 down-left.
    direction = (torch.atan2(dy, dx) / (math.pi / 4)).round().long() % 4
    ahead = torch.stack([windows[cell] for cell in (5, 8, 7, 6)]).gather(0, direction[None])[0]
    behind = torch.stack([windows[cell] for cell in (3, 0, 1, 2)]).gather(0, direction[None])[0]
    ridge = (slope >= ahead) & (slope > behind)  # of two equal neighbours one
    weak = (ridge & (slope > CANNY_LOW)).float()
    edges = (ridge & (slope > CANNY_HIGH)).float()
    while True:
        grown = torch.minimum(dilate(edges, 3), weak)
        if torch.equal(grown, edges):
            return edges
        edges = grown


def soft_edges(grey: Tensor) -> Tensor:
    """The slope of a brightness (H,W) in [0,1], smooth, its strongest at 1."""
    dx, dy = _slopes(blur(grey, SOFT_SIGMA))
    slope = torch.hypot(dx, dy)
    strongest = float(slope.max())
    return slope / strongest if strongest > MIN_CONTRAST / 4 else torch.zeros_like(slope)


def _slopes(grey: Tensor) -> tuple[Tensor, Tensor]:
    """Sobel's slopes along x and y, (H,W) each; 1 for a step from 0 to 1."""
    kernel = grey.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4
    both = F.conv2d(_padded(grey, 1), torch.stack([kernel, kernel.T])[:, None])[0]
    return both[0], both[1]


# ----- neighbourhoods -------------------------------------------------------------------------------------------------


def blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (H,W); `sigma` in pixels. The border goes on outside."""
    radius = math.ceil(3 * sigma)
    steps = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-steps.square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    padded = _padded(x, radius)
    return F.conv2d(F.conv2d(padded, kernel[None, None, None]), kernel[None, None, :, None])[0, 0]


def dilate(lines: Tensor, size: int) -> Tensor:
    """The largest value in each square of `size` pixels around a pixel of (H,W); 1 and less changes nothing."""
    if size <= 1:
        return lines
    before = (size - 1) // 2
    padded = F.pad(lines[None, None], (before, size - 1 - before) * 2, value=-math.inf)
    rows = F.max_pool2d(
        padded, (1, size), stride=1
    )  # the largest of a square is the largest of its rows' largest
    return F.max_pool2d(rows, (size, 1), stride=1)[0, 0]


def erode(lines: Tensor, size: int) -> Tensor:
    """The smallest value in each square of `size` pixels around a pixel of (H,W)."""
    return -dilate(-lines, size)


def _padded(x: Tensor, margin: int) -> Tensor:
    return F.pad(x[None, None], (margin,) * 4, mode="replicate")


# ----- annotators -----------------------------------------------------------------------------------------------------


def annotate(picture: Image.Image, kind: str) -> Image.Image:
    """What the annotator of this kind makes of a picture; its weights come from the Hub when first used."""
    found = _annotator(kind)(to_rgb(picture))
    assert isinstance(found, Image.Image)
    return found


@functools.cache
def _annotator(kind: str) -> Callable[[Image.Image], Any]:
    try:
        import controlnet_aux
    except ImportError as error:
        raise ValueError(
            f"the condition {kind!r} needs controlnet-aux: pip install 'sana-sprint[control]'"
        ) from error
    made: Callable[[Image.Image], Any] = getattr(controlnet_aux, ANNOTATORS[kind]).from_pretrained(
        ANNOTATOR_WEIGHTS
    )
    return made
