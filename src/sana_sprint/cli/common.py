"""Shared by the commands: reporting failures, the terminal, and checks of arguments."""

from __future__ import annotations

import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import typer

if TYPE_CHECKING:
    from rich.console import Console

DEBUG_VARIABLE = "SANA_SPRINT_DEBUG"  # set: failures show their traceback
INTERRUPTED = 130  # 128 + SIGINT, the shells' convention

# The extra that installs each optional library.
EXTRAS = {
    "asgi_correlation_id": "serve",
    "bitsandbytes": "train",
    "bs4": "caption",
    "cachetools": "serve",
    "fastapi": "serve",
    "ftfy": "caption",
    "open_clip": "evaluate",
    "prometheus_client": "serve",
    "pyarrow": "train",
    "pydantic_settings": "serve",
    "tensorboard": "train",
    "uvicorn": "serve",
}

# Raised by typer for a call it cannot parse. It comes from typer itself or, in older releases, from click.
_CallError: type[Exception] = cast("type[Exception]", typer.BadParameter.__base__)


class CommandError(Exception):
    """Ends the command with one line that says what is wrong and one that says what to do."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(CommandError):
    """The call itself is wrong."""

    exit_code = 2


# ----- failing --------------------------------------------------------------------------------------------------------


def report_errors(run: Callable[[], Any]) -> int:
    """Run a command and return the exit code; a failure is reported on stderr in two lines.

    Exceptions that no input should cause are not caught: their traceback is what a bug report needs.
    """
    try:
        code = run()  # typer gives back the code of an Exit, and None after a command
    except KeyboardInterrupt:
        code = INTERRUPTED
    except (_CallError, CommandError, ImportError, MemoryError, OSError, RuntimeError, ValueError) as error:
        if os.environ.get(DEBUG_VARIABLE):
            traceback.print_exc()
        message, hint, code = _explained(error)
        typer.echo(f"error: {_one_line(message)}\nhint: {_one_line(hint)}", err=True)
    if code == INTERRUPTED:
        typer.echo("interrupted", err=True)
    return code if isinstance(code, int) else 0


def _explained(error: Exception) -> tuple[str, str, int]:
    """(what is wrong, what to do, exit code)"""
    if isinstance(error, CommandError):
        return str(error), error.hint, error.exit_code
    if isinstance(error, _CallError):
        return _explained_call(error)
    if isinstance(error, ImportError):
        package = (error.name or "").partition(".")[0]
        if extra := EXTRAS.get(package):
            return f"this needs {package}, which is not installed", f"pip install 'sana-sprint[{extra}]'", 1
        return str(error), "reinstall with: pip install --force-reinstall sana-sprint", 1
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # the latter is torch's
        return (
            "not enough memory",
            "make smaller pictures, or use --vae-tiling, --vae-slicing or --dtype bf16",
            1,
        )
    text = str(error) or type(error).__name__
    return text, f"set {DEBUG_VARIABLE}=1 to see where it happened", 1


def _explained_call(error: Any) -> tuple[str, str, int]:
    message = error.format_message()
    context = error.ctx
    path = "sana-sprint" if context is None else context.command_path
    hint = f"see what is allowed with `{path} --help`"
    if unknown := re.match(r"No such command '(.*)'\.?$", message, re.DOTALL):
        commands = context.command.list_commands(context)
        hint = f"the commands are {', '.join(commands)}"
        if similar := difflib.get_close_matches(unknown[1], commands, n=1):
            hint = f"did you mean `{path} {similar[0]}`?"
        elif " " in unknown[1]:
            hint = f'to draw that, run `{path} generate "{unknown[1]}"`'
    return message[:1].lower() + message[1:].rstrip("."), hint, 2


def _one_line(text: str) -> str:
    return " ".join(text.split())


def import_from_here() -> None:
    """Let modules of the current folder be imported, as `python script.py` does: data sources and judges are the user's."""
    sys.path.insert(0, os.getcwd())


def console() -> Console:
    """The terminal for progress and remarks: stderr, without colour where NO_COLOR asks for that."""
    from rich.console import Console

    return Console(stderr=True)


def checked(check: Callable[[], Any], *, hint: str) -> Any:
    """The result of `check()`; its ValueError becomes a UsageError."""
    try:
        return check()
    except ValueError as error:
        raise UsageError(str(error), hint=hint) from error
