"""Collects the prompts of a command from its arguments, a file and stdin."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sana_sprint.cli.common import UsageError

STDIN = "-"
HINT = 'say what to draw, such as `sana-sprint generate "two apples on a blue background"`'


def gather_prompts(arguments: Sequence[str], file: Path | None) -> list[str]:
    """Arguments in order, with the lines of stdin in place of `-`, then the file's lines.

    Without arguments and file the lines of stdin, unless that is a terminal. Blank lines are skipped.

    Raises:
        UsageError: for an empty argument, text that cannot be read, or no prompt at all.
    """
    prompts: list[str] = []
    if not arguments and file is None and not sys.stdin.isatty():
        arguments = [STDIN]
    for argument in arguments:
        if not argument.strip():
            raise UsageError("a prompt is empty", hint=HINT)
        prompts += _lines(sys.stdin.buffer.read(), "stdin") if argument == STDIN else [argument.strip()]
    if file is not None:
        prompts += _lines(_content(file), str(file))
    if not prompts:
        raise UsageError("no prompt", hint=HINT)
    return prompts


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UsageError(
            f"cannot read {file}: {error.strerror}", hint="--file is a text file, one prompt per line"
        ) from error


def _lines(content: bytes, name: str) -> list[str]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 text", hint="save it as UTF-8, one prompt per line") from error
    return [line.strip() for line in text.split("\n") if line.strip()]
