"""`sana-sprint data`: checks pictures before training, and clears caches after it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sana_sprint.cli.common import CommandError, checked, console, import_from_here

if TYPE_CHECKING:
    from sana_sprint.train.data.check import Check, Spread

SHOWN = 10  # names of a kind in the text; --json has all


data = typer.Typer(rich_markup_mode=None, add_completion=False)


@data.callback(invoke_without_command=True)
def _root(ctx: typer.Context) -> None:
    """Check training pictures, or clear the caches made from them."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@data.command()
def check(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder of pictures, .tar or .parquet files; a .jsonl, .csv, .parquet or .tar file; "
            "or module:function.",
        ),
    ],
    size: Annotated[int, typer.Option(help="Native side of the model in pixels, for the buckets.")] = 1024,
    multiple: Annotated[int, typer.Option(help="Pixels per token of the model.")] = 32,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Look at the first N samples only; a function needs it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check training pictures: sizes, buckets, captions, and samples that cannot be used.

    Exit code 1 if a picture is unreadable, or has no caption while others have one.
    """
    from sana_sprint.resolutions import buckets

    checked(lambda: buckets(size, multiple), hint="--size is 1024 for most models, --multiple is 32")
    found = _look(source, size, multiple, limit)
    typer.echo(json.dumps(asdict(found), indent=2) if as_json else "\n".join(_lines(found)))
    if found.unusable:
        raise CommandError(
            f"{len(found.unusable)} of {found.samples} samples cannot be used, the first: {found.unusable[0]}",
            hint="repair or remove them; `--json` lists all",
        )


@data.command()
def prune(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="The folder beside the runs that holds latents/ or embeddings/."
        ),
    ],
    keep: Annotated[
        list[Path],
        typer.Option(
            metavar="STAGE.toml",
            help="A run whose files stay; may be given several times. A run's config.json works too.",
        ),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list the files that would be deleted.")
    ] = False,
) -> None:
    """Delete cached latents and embeddings that none of the kept runs reads.

    Only time to encode is lost: a run recreates missing files. The pictures of the kept runs are read to find their files.
    """
    from sana_sprint.train.config import load_config

    runs = checked(
        lambda: [load_config(path) for path in keep],
        hint="--keep is a stage file that `sana-sprint train` takes",
    )
    import_from_here()
    from sana_sprint.train.cache.unused import FOLDERS, unused_files

    if not any((folder / name).is_dir() for name in FOLDERS):
        raise CommandError(f"{folder} holds no caches", hint="give the folder in which the runs' outputs lie")
    try:
        unused = unused_files(folder, runs)
    except ValueError as error:
        raise CommandError(str(error), hint="nothing was deleted") from error
    sizes = [path.stat().st_size for path in unused]
    for path, size in zip(unused, sizes, strict=True):
        typer.echo(f"{size / 1e6:10.2f} MB  {path}")
        if not dry_run:
            path.unlink()
    done = "would be deleted" if dry_run else "deleted"
    typer.echo(f"{sum(sizes) / 1e6:10.2f} MB  in {len(unused)} files {done}")


def _look(source: str, size: int, multiple: int, limit: int | None) -> Check:
    import_from_here()
    from sana_sprint.train.data.check import check_source

    try:
        return check_source(source, size=size, multiple=multiple, limit=limit, progress=_progress)
    except ValueError as error:
        hint = f"a source is looked for from here: {os.getcwd()}; a function needs --limit"
        raise CommandError(str(error), hint=hint) from error


def _progress(positions: range) -> Iterator[int]:
    from rich.progress import track

    terminal = console()
    yield from track(positions, "reading", console=terminal, transient=True, disable=not terminal.is_terminal)


def _lines(found: Check) -> list[str]:
    facts = {
        "source": found.source,
        "samples": f"{found.samples}, {found.held_out} of the set held out for validation",
        "width": _spread(found.widths, "px"),
        "height": _spread(found.heights, "px"),
        "captions": f"{_spread(found.captions_per_picture, 'each')}; "
        f"{_spread(found.caption_characters, 'characters')}; {_spread(found.caption_words, 'words')}",
    }
    lines = [f"{name:<11} {value}" for name, value in facts.items()]
    most = max(found.buckets.values(), default=1)
    lines += ["", "bucket (height x width)"]
    lines += [f"{name:>9} {count:>8} {'#' * -(-40 * count // most)}" for name, count in found.buckets.items()]
    lines += _listed("unreadable", [f"{name}: {reason}" for name, reason in found.unreadable.items()])
    if found.has_captions:
        lines += _listed("without a caption", found.uncaptioned)
    else:
        lines += ["", "no picture has a caption: this set can train an autoencoder only"]
    lines += _listed("the same picture", [" = ".join(names) for names in found.duplicates])
    return lines + _listed("smaller than their bucket (would be enlarged)", found.enlarged)


def _spread(spread: Spread, unit: str) -> str:
    return f"{spread.min:g} to {spread.max:g} {unit}, median {spread.median:g}"


def _listed(title: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    if not names:
        return []
    more = [f"  and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return ["", f"{title}: {len(names)}", *(f"  {name}" for name in names[:SHOWN]), *more]
