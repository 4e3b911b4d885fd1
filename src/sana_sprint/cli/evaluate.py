"""`sana-sprint evaluate`: scores of a model or of pictures."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sana_sprint.cli import options
from sana_sprint.cli.common import UsageError, checked, import_from_here
from sana_sprint.cli.drawing import progress_bar
from sana_sprint.cli.loading import ModelOptions, choose_device, load_pipeline

if TYPE_CHECKING:
    from sana_sprint.evaluate.features import Extractor

evaluate = typer.Typer(rich_markup_mode=None, add_completion=False)


@evaluate.callback(invoke_without_command=True)
def _root(ctx: typer.Context) -> None:
    """Score a model or pictures."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


class Space(StrEnum):
    """Feature spaces of the Frechet distance."""

    DCAE = "dcae"
    INCEPTION = "inception"


# In the repository, not in the installed package: it belongs to the recipe.
EMOJI_JUDGE = "recipes.emoji.judge"
OWN_JUDGE_HINT = (
    "the emoji model's judge is in the repository: run this in a checkout, or name a module with --judge"
)
JUDGE_HINT = "--judge is the dotted name of a module that can be imported from the current folder"
PICTURES = (".png", ".jpg", ".jpeg", ".webp")

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Pictures, at any depth.")]


@evaluate.command()
def compositional(
    model: options.Model = "emoji",
    judge: Annotated[
        str, typer.Option(metavar="MODULE", help="Module with the judge; the current folder is searched too.")
    ] = EMOJI_JUDGE,
    steps: Annotated[
        list[int] | None,
        typer.Option(help="Network evaluations; may be given several times. 1, 2 and 4 by default."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Held-out scenes.")] = 300,
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", "-g", help="Guidance scale; the pipeline's default if not given."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", "-s", min=0, help="Picture i has seed + i.")] = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write sheets of pictures and all verdicts there.")
    ] = None,
    dtype: options.DtypeOption = options.Dtype.AUTO,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Share of pictures that a judge finds correct.

    Draws the judge's held-out scenes and counts the pictures that show what their captions say.

    Example: sana-sprint evaluate compositional --model runs/emoji/student/final --steps 1 --steps 2 --out scores/
    """
    from sana_sprint.sampling import schedule

    numbers = steps or [1, 2, 4]
    checked(lambda: [schedule(number) for number in numbers], hint="1 to 4 steps are best")
    import_from_here()

    from sana_sprint.evaluate.compositional import draw, import_judge, score, table

    jury = checked(lambda: import_judge(judge), hint=OWN_JUDGE_HINT if judge == EMOJI_JUDGE else JUDGE_HINT)
    scenes = jury.evaluation_scenes(count)
    pipeline = load_pipeline(ModelOptions(model, dtype, device))
    rows: dict[str, dict[str, float]] = {}
    with progress_bar() as bar:
        task = bar.add_task("drawing", total=len(scenes) * len(numbers))
        for number in numbers:
            pictures = draw(
                pipeline,
                [scene.caption for scene in scenes],
                num_steps=number,
                guidance=guidance,
                first_seed=seed,
                on_progress=lambda done: bar.advance(task, done),
            )
            name = f"{number}-step{'s' * (number > 1)}"
            rows[name] = score(jury, pictures, scenes, name=name, folder=out)
    settings = {"model": model, "judge": judge, "count": len(scenes), "guidance": guidance, "seed": seed}
    typer.echo(json.dumps({**settings, "scores": rows}) if as_json else table(rows))


@evaluate.command()
def fid(
    one: Folder,
    other: Folder,
    features: Annotated[
        Space,
        typer.Option(help="dcae: features of a DC-AE. inception: those of published FIDs; needs --weights."),
    ] = Space.DCAE,
    model: options.Model = "emoji",
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="inception-2015-12-05.pt, the TorchScript file.")
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Side in pixels that pictures are resized to for dcae; the model's own if left out."
        ),
    ] = None,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Frechet distance between two sets of pictures.

    0 for equal sets. Needs more pictures than features on both sides: over 512 for dcae with the embedded model, over 2048 for inception.
    Fewer pictures give greater distances, so compare only distances measured with equally many.
    """
    from sana_sprint.evaluate.features import features_of
    from sana_sprint.evaluate.frechet import distance, fit

    folders = [_pictures(one), _pictures(other)]
    extract, side = _extractor(features, model, weights, size, choose_device(device))
    with progress_bar() as bar:
        task = bar.add_task("reading", total=sum(map(len, folders)))
        gaussians = [
            fit(features_of(files, extract, size=side, on_progress=lambda done: bar.advance(task, done)))
            for files in folders
        ]
    result = {
        "fid": distance(*gaussians),
        "features": features.value,
        "size": side,
        "dimensions": len(gaussians[0].mean),
        "pictures": [len(files) for files in folders],
    }
    typer.echo(
        json.dumps(result) if as_json else f"{result['fid']:.4g}\t{features.value} features at {side} px"
    )


@evaluate.command()
def clip(
    folder: Folder,
    model: Annotated[str, typer.Option(help="An open_clip architecture.")] = "ViT-L-14",
    weights: Annotated[
        str, typer.Option(metavar="FILE|TAG", help="A file, or an open_clip tag, which is downloaded.")
    ] = "openai",
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Agreement of pictures with captions: the mean CLIP score, 100 times the cosine.

    A picture's caption is the .txt file beside it, or else the prompt inside its PNG file.
    """
    from sana_sprint.evaluate.captions import caption_of, clip_scorer

    files = _pictures(folder)
    captions = [caption_of(file) for file in files]
    scores = clip_scorer(model, weights, device=choose_device(device))(files, captions)
    mean = sum(scores) / len(scores)
    result = {"clip": mean, "model": model, "weights": weights, "pictures": len(files)}
    typer.echo(
        json.dumps(result) if as_json else f"{mean:.3f}\tCLIP {model} ({weights}), {len(files)} pictures"
    )


def _pictures(folder: Path) -> list[Path]:
    """Raises UsageError if there are none."""
    if not folder.is_dir():
        raise UsageError(f"not a folder: {folder}", hint="name folders of pictures")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    if not files:
        raise UsageError(f"no pictures in {folder}", hint=f"pictures end in {', '.join(PICTURES)}")
    return files


def _extractor(
    space: Space, model: str, weights: Path | None, size: int | None, device: str
) -> tuple[Extractor, int]:
    """The features, and the side of the pictures that they are computed from."""
    from sana_sprint.evaluate.features import INCEPTION_SIZE, dcae_features, inception_features

    if space is Space.INCEPTION:
        if weights is None or size is not None:
            hint = f"name the network's file with --weights; its pictures have {INCEPTION_SIZE} pixels a side"
            raise UsageError("inception features need --weights and have no --size", hint=hint)
        return inception_features(weights, device=device), INCEPTION_SIZE
    if weights is not None:
        raise UsageError("--weights is for inception features", hint="add --features inception")
    from sana_sprint import backends
    from sana_sprint.models.autoencoder import AutoencoderDC
    from sana_sprint.resolutions import native_size
    from sana_sprint.weights import load_model, resolve_folder
    from sana_sprint.weights.files import read_json

    folder = resolve_folder(model)
    autoencoder = backends.apply(load_model(AutoencoderDC, folder / "vae", device=device))
    ratio = autoencoder.spatial_compression_ratio
    config = read_json(folder / "transformer" / "config.json")
    side = size or native_size(int(config["sample_size"]), ratio)
    if side % ratio:
        raise UsageError(f"--size must be a multiple of {ratio}, got: {side}", hint="or leave it out")
    return dcae_features(autoencoder), side
