"""The picture that drawings follow: its options, checked, and the preview of what the model sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_sprint.cli.common import UsageError, checked
from sana_sprint.cli.pictures import check_target, is_file_target, write_picture

if TYPE_CHECKING:
    from sana_sprint.cli.drawing import Drawn

READY = "none"  # the kind of a picture that is a control already
KIND_HINT = "--kind is scribble, canny, softedge, none for a ready control, or with controlnet-aux hed, depth, lineart, ..."
IMAGE_HINT = "--image is a picture of any common format, with lines to follow on it"


@dataclass(frozen=True)
class Control:
    """A picture to follow, read and checked; empty where there is none.

    arguments: of the pipeline's call. notes: for the files and the report. preview: a file to write, or None.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    preview: Path | None = None
    controlnet: Path | None = None

    def write_preview(self, drawn: Drawn, settings: Mapping[str, Any]) -> None:
        """Write the control picture that the model saw, if that was asked for."""
        if self.preview is not None:
            picture: Any = drawn.output.conditions[0]
            write_picture(picture, self.preview, self.preview.stem, settings)


def read_control(
    image: Path | None,
    *,
    kind: str | None,
    thickness: int | None,
    preview: Path | None,
    scale: float | None,
    start: float | None,
    end: float | None,
    controlnet: Path | None,
) -> Control:
    """Read and check the options of these names, before a model is loaded; None for one that was not given.

    Raises:
        UsageError: for wrong values, a picture that cannot be read or followed, and options without an image.
    """
    given = {
        "kind": kind,
        "thickness": thickness,
        "preview": preview,
        "scale": scale,
        "start": start,
        "end": end,
        "controlnet": controlnet,
    }
    if image is None:
        if alone := [f"--{name}" for name, value in given.items() if value is not None]:
            raise UsageError(
                f"{alone[0]} is about a picture to follow, and --image is missing", hint=IMAGE_HINT
            )
        return Control()
    if preview is not None:
        _check_preview(preview)
    kind = "scribble" if kind is None else kind
    scale = 1.0 if scale is None else scale
    arguments = {
        **_picture_arguments(image, kind, thickness),
        **_strength_arguments(scale, 0.0 if start is None else start, 1.0 if end is None else end),
    }
    notes = {"image": str(image), "kind": kind, "controlnet_conditioning_scale": scale}
    return Control(arguments, notes, preview, controlnet)


def _check_preview(preview: Path) -> None:
    check_target(preview, 1)
    if not is_file_target(preview):
        raise UsageError(f"--preview must be a .png file, got: {preview}", hint="such as --preview seen.png")


def _picture_arguments(image: Path, kind: str, thickness: int | None) -> dict[str, Any]:
    """The picture, read once here for all calls, and its kind."""
    from sana_sprint.controls import check_kind, control_picture, open_picture

    wanted = None if kind == READY else kind
    checked(lambda: check_kind(wanted, thickness), hint=KIND_HINT)
    picture = checked(lambda: open_picture(image), hint=IMAGE_HINT)
    if wanted == "scribble":  # a blank one is refused before a model is loaded
        checked(lambda: control_picture(picture, wanted, picture.height, picture.width), hint=IMAGE_HINT)
    return {"image": picture, "kind": wanted, "thickness": thickness}


def _strength_arguments(scale: float, start: float, end: float) -> dict[str, Any]:
    if not 0 <= scale < float("inf"):
        raise UsageError(f"--scale must be at least 0, got: {scale:g}", hint="1 is usual")
    if not 0 <= start < end <= 1:
        raise UsageError(
            f"--start must lie below --end, got: {start:g} and {end:g}", hint="both are shares from 0 to 1"
        )
    return {
        "controlnet_conditioning_scale": scale,
        "control_guidance_start": start,
        "control_guidance_end": end,
    }
