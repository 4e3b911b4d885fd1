"""The options of the commands, with their help texts."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(StrEnum):
    """Number formats; `loading.DTYPES` says what they mean for each component."""

    AUTO = "auto"
    BF16 = "bf16"
    FP32 = "fp32"
    FP16 = "fp16"


RANDOM_SEED = -1

# ----- the model and how it runs ---------------------------------------------------------------------------------------

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        envvar="SANA_SPRINT_MODEL",
        help="'emoji' (comes with the package), a folder, or a Hub id owner/name.",
    ),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        "--dtype", help="Number format of the weights; auto: as stored. fp16: the transformer's only."
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="auto|cpu|cuda|mps",
        help="Device to run on; auto: an accelerator if there is one.",
    ),
]
VaeTiling = Annotated[
    bool, typer.Option("--vae-tiling", help="Decode in tiles: big pictures in little memory.")
]
VaeSlicing = Annotated[bool, typer.Option("--vae-slicing", help="Decode pictures one by one: less memory.")]
Fast = Annotated[
    bool,
    typer.Option(
        help="On CUDA: fused kernels and graphs. The first picture of each size takes seconds longer.",
    ),
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="PATH[:WEIGHT]",
        help="A LoRA: a safetensors file, a folder or a Hub id, and its strength (1 by default). May be repeated.",
    ),
]
Quantize = Annotated[
    str,
    typer.Option(
        "--quantize",
        metavar="PRESET|COMPONENT=PRESET,...",
        help="int8, int8-weights, fp8, int4-weights or nf4, for the transformer and the text encoder or for the components named.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Folder = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="FOLDER", help="Folder for the pictures; created if missing."),
]

# ----- pictures -------------------------------------------------------------------------------------------------------

Prompts = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PROMPT", help="What to draw. `-`, or no prompt and piped input: each line of stdin."
    ),
]
PromptFile = Annotated[
    Path | None, typer.Option("--file", "-f", metavar="FILE", help="Draw each line of this text file too.")
]
Steps = Annotated[int, typer.Option("--steps", help="Network evaluations per picture; 1 to 4 are best.")]
NumImages = Annotated[int, typer.Option("--num-images", "-n", help="Pictures per prompt.")]
Seed = Annotated[
    int,
    typer.Option(
        "--seed", "-s", help="Picture i, counted from 0, has seed + i. -1: a random seed, which is printed."
    ),
]
Size = Annotated[
    str | None,
    typer.Option("--size", metavar="N|WxH", help="Size in pixels; the model's native size by default."),
]
Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="FOLDER|FILE.png",
        help="A folder (created if missing; its files are not replaced), or the file of a single picture.",
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        "--guidance", "-g", help="How closely to follow the prompt; 4 to 5 are best, 4.5 by default."
    ),
]
MaxTimesteps = Annotated[
    float | None, typer.Option("--max-timesteps", help="First time, an angle up to 1.5708 (pure noise).")
]
IntermediateTimesteps = Annotated[
    float | None, typer.Option("--intermediate-timesteps", help="Second of two times; 1.3 by default.")
]
CleanCaption = Annotated[
    bool, typer.Option("--clean-caption", help="Remove links, markup and the like from prompts from the web.")
]

# ----- a picture to follow --------------------------------------------------------------------------------------------
# None means that the option was not given; without --image none of the others may be.

ImageFile = Annotated[
    Path | None,
    typer.Option("--image", "-i", metavar="FILE", help="A picture to follow, such as a sketch."),
]
Kind = Annotated[
    str | None,
    typer.Option(
        "--kind",
        "-k",
        help="scribble (the default): a drawing. canny, softedge: the edges of a picture. none: a control picture "
        "as the model takes it. hed, depth, lineart and more need controlnet-aux.",
    ),
]
Thickness = Annotated[
    int | None,
    typer.Option("--thickness", help="Redraw a scribble's lines this many pixels wide; as drawn by default."),
]
Preview = Annotated[
    Path | None,
    typer.Option("--preview", metavar="FILE.png", help="Write the control picture that the model sees."),
]
Scale = Annotated[
    float | None, typer.Option("--scale", help="How closely to follow it; 0: not at all, 1 by default.")
]
Start = Annotated[
    float | None,
    typer.Option("--start", help="Share of the steps after which following begins, 0 to 1; 0 by default."),
]
End = Annotated[
    float | None,
    typer.Option("--end", help="Share of the steps after which following ends, 0 to 1; 1 by default."),
]
ControlNet = Annotated[
    Path | None,
    typer.Option("--controlnet", metavar="FOLDER", help="A ControlNet to use instead of the model's own."),
]
