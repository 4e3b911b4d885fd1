"""`sana-sprint data check`: a set of pictures looked through before a training."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from sana_sprint.cli.common import CommandError, checked, console

if TYPE_CHECKING:
    from sana_sprint.train.data.check import Check, Spread

SHOWN = 10  # names of a kind in the text; --json has all


class Action(StrEnum):
    """What can be done with data."""

    check = "check"


def data(
    action: Annotated[Action, typer.Argument(help="check: read everything and tell what is there.")],
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
    """Look through training pictures: sizes, buckets, captions, and what cannot be used.

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


def _look(source: str, size: int, multiple: int, limit: int | None) -> Check:
    sys.path.insert(0, os.getcwd())  # as `sana-sprint train` has it: a function is in a module of the user's
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
