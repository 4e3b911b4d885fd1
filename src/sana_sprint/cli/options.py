"""Options that several commands have, with their help texts."""

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
        help="Where to compute; auto: an accelerator if there is one.",
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
        help="A LoRA: a safetensors file, a folder or a Hub id, and its strength (1 if left out). May be repeated.",
    ),
]
Quantize = Annotated[
    str,
    typer.Option(
        "--quantize",
        metavar="PRESET|COMPONENT=PRESET,...",
        help="int8, int8-weights, fp8, int4-weights or nf4: of transformer and text encoder, or of those named.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Folder = Annotated[
    Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the pictures go; made if absent.")
]
