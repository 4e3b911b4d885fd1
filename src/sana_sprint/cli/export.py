"""`sana-sprint export`: a trained or downloaded model into another folder, dtype or form."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sana_sprint.cli.common import UsageError, checked

if TYPE_CHECKING:
    from sana_sprint.weights import ModelClass

SINGLE_FILE = ".safetensors"


def export(
    model: Annotated[str, typer.Argument(help="'emoji', a folder such as a run's final/, or a Hub id.")],
    target: Annotated[
        Path,
        typer.Argument(help="A folder for the whole pipeline, or a file NAME.safetensors for one component."),
    ],
    component: Annotated[
        str | None, typer.Option(help="Component in a single file: transformer (the default) or vae.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Number format of the weights: fp32 or bf16; as stored by default.")
    ] = None,
) -> None:
    """Write a model as a pipeline folder that diffusers loads too, or one of its components as a single file."""
    wanted = _dtype(dtype)
    if target.suffix == SINGLE_FILE:
        _export_component(model, target, component or "transformer", wanted)
    elif component is not None:
        raise UsageError(
            f"--component {component} needs a file to write, got the folder {target}",
            hint=f"name a file such as {component}{SINGLE_FILE}",
        )
    else:
        from sana_sprint.pipelines.text_to_image import SanaSprintPipeline

        SanaSprintPipeline.from_pretrained(model, torch_dtype=wanted).save_pretrained(target)
    typer.echo(target)


def _export_component(model: str, target: Path, component: str, dtype: Any) -> None:
    from sana_sprint.weights import load_model, resolve_folder, save_single_file

    cls = _component_class(component)
    folder = checked(lambda: resolve_folder(model), hint="name a folder, 'emoji' or a Hub id owner/name")
    save_single_file(load_model(cls, folder / component), target, dtype=dtype)


def _component_class(name: str) -> ModelClass[Any]:
    from sana_sprint.models.autoencoder import AutoencoderDC
    from sana_sprint.models.transformer import SanaTransformer2DModel

    classes: dict[str, ModelClass[Any]] = {"transformer": SanaTransformer2DModel, "vae": AutoencoderDC}
    if name not in classes:
        raise UsageError(
            f"--component is {name!r}, which no single file can hold",
            hint=f"allowed are {', '.join(classes)}",
        )
    return classes[name]


def _dtype(name: str | None) -> Any:
    import torch

    allowed = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}
    if name not in allowed:
        raise UsageError(f"--dtype is {name!r}", hint="allowed are fp32 and bf16")
    return allowed[name]
