"""`sana-sprint control`: prompts and a picture to follow, such as a sketch, to PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sana_sprint.cli import options
from sana_sprint.cli.common import UsageError, checked
from sana_sprint.cli.generate import (
    RANDOM_SEED,
    CleanCaption,
    Guidance,
    IntermediateTimesteps,
    MaxTimesteps,
    NumImages,
    Output,
    PromptFile,
    Prompts,
    Seed,
    Size,
    Steps,
    call_arguments,
    plan,
)
from sana_sprint.cli.loading import ModelOptions, load_control_pipeline
from sana_sprint.cli.pictures import check_target, is_file_target, write_picture

if TYPE_CHECKING:
    from sana_sprint.cli.drawing import Drawn

READY = "none"  # the kind of a picture that is a condition already
KIND_HINT = "--kind is scribble, canny, softedge, none for a ready condition, or with controlnet-aux hed, depth, lineart, ..."
IMAGE_HINT = "--image is a picture of any common format, with lines to follow on it"

ImageFile = Annotated[
    Path, typer.Option("--image", "-i", metavar="FILE", help="The picture to follow, such as a sketch.")
]
Kind = Annotated[
    str,
    typer.Option(
        "--kind",
        "-k",
        help="scribble: a drawing. canny, softedge: the edges of a picture. none: a ready condition. "
        "hed, depth, lineart and more need controlnet-aux.",
    ),
]
Thickness = Annotated[
    int | None,
    typer.Option(
        "--thickness", help="Redraw a scribble's lines this many pixels wide; as drawn if left out."
    ),
]
Preview = Annotated[
    Path | None,
    typer.Option(
        "--preview", metavar="FILE.png", help="Write what the model saw of the picture to this file."
    ),
]
Scale = Annotated[float, typer.Option("--scale", help="How strictly to follow; 0: not at all.")]
Start = Annotated[
    float, typer.Option("--start", help="Share of the steps after which following begins, 0 to 1.")
]
End = Annotated[float, typer.Option("--end", help="Share of the steps after which following ends, 0 to 1.")]
ControlNet = Annotated[
    Path | None,
    typer.Option("--controlnet", metavar="FOLDER", help="A controlnet in place of the model's own."),
]


def control(
    prompts: Prompts = None,
    *,
    image: ImageFile,
    kind: Kind = "scribble",
    thickness: Thickness = None,
    preview: Preview = None,
    scale: Scale = 1.0,
    start: Start = 0.0,
    end: End = 1.0,
    file: PromptFile = None,
    model: options.Model = "emoji",
    controlnet: ControlNet = None,
    steps: Steps = 2,
    num_images: NumImages = 1,
    seed: Seed = RANDOM_SEED,
    size: Size = None,
    output: Output = Path("out"),
    guidance: Guidance = None,
    max_timesteps: MaxTimesteps = None,
    intermediate_timesteps: IntermediateTimesteps = None,
    dtype: options.DtypeOption = options.Dtype.AUTO,
    device: options.Device = "auto",
    vae_tiling: options.VaeTiling = False,
    vae_slicing: options.VaeSlicing = False,
    lora: options.Lora = None,
    quantize: options.Quantize = "",
    fast: options.Fast = False,
    clean_caption: CleanCaption = False,
    as_json: options.Json = False,
) -> None:
    """Draw pictures of one or more prompts that follow another picture.

    Prints a line with the path and seed of each. How a picture was made is kept inside its PNG file.

    Example: sana-sprint control "a red heart" --image sketch.png --kind scribble
    """
    task = plan(prompts, file, num_images, seed, output, as_json)
    if preview is not None:
        _check_preview(preview)
    arguments = {
        **_following(image, kind, thickness, scale, start, end),
        **call_arguments(size, guidance, steps, max_timesteps, intermediate_timesteps, clean_caption),
    }
    wanted = ModelOptions(model, dtype, device, vae_tiling, vae_slicing, tuple(lora or ()), quantize, fast)
    followed = {"image": str(image), "kind": kind, "controlnet_conditioning_scale": scale}
    notes = {**followed, **wanted.notes()}
    drawn = task.run(lambda: load_control_pipeline(wanted, controlnet), model, arguments, notes)
    if preview is not None:
        _write_preview(drawn, preview, {**notes, "model": model})


def _check_preview(preview: Path) -> None:
    check_target(preview, 1)
    if not is_file_target(preview):
        raise UsageError(f"--preview must be a .png file, got: {preview}", hint="such as --preview seen.png")


def _following(
    image: Path, kind: str, thickness: int | None, scale: float, start: float, end: float
) -> dict[str, Any]:
    """The arguments about the picture, which is read once here for all calls."""
    from sana_sprint.controls import check_kind, control_picture, open_picture

    wanted = None if kind == READY else kind
    checked(lambda: check_kind(wanted, thickness), hint=KIND_HINT)
    picture = checked(lambda: open_picture(image), hint=IMAGE_HINT)
    if wanted == "scribble":  # a blank one is refused before a model is loaded
        checked(lambda: control_picture(picture, wanted, picture.height, picture.width), hint=IMAGE_HINT)
    if not 0 <= scale < float("inf"):
        raise UsageError(f"--scale must be at least 0, got: {scale:g}", hint="1 is usual")
    if not 0 <= start < end <= 1:
        raise UsageError(
            f"--start must lie below --end, got: {start:g} and {end:g}", hint="both are shares from 0 to 1"
        )
    return {
        "image": picture,
        "kind": wanted,
        "thickness": thickness,
        "controlnet_conditioning_scale": scale,
        "control_guidance_start": start,
        "control_guidance_end": end,
    }


def _write_preview(drawn: list[Drawn], preview: Path, settings: dict[str, Any]) -> None:
    write_picture(drawn[0].output.conditions[0], preview, preview.stem, settings)
