"""The `sana-sprint` command. Each command is a module of this folder, imported when it is asked for.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 not a valid call, 130 interrupted.
"""

import sys
from functools import partial
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sana_sprint import __version__
from sana_sprint.cli.common import report_errors

COMMANDS = (
    "generate",
    "control",
    "demo",
    "info",
    "train",
    "data",
    "evaluate",
    "export",
    "serve",
)  # modules and names in them
CONTEXT = {"help_option_names": ["-h", "--help"]}


class _Commands(TyperGroup):
    """Imports a command when it is named, and ends every failure with one line and a hint."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        function = getattr(import_module(f"{__name__}.{cmd_name}"), cmd_name)
        if isinstance(function, typer.Typer):  # a command with commands of its own
            return typer.main.get_group(function)
        single = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        single.command(cmd_name, context_settings=CONTEXT)(function)
        return typer.main.get_command(single)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        run = partial(super().main, *args, **{**kwargs, "standalone_mode": False})
        if not kwargs.get("standalone_mode", True):
            return run()
        sys.exit(report_errors(run))


# Help is plain text: it is instant, and reads the same in a terminal, a file and a pipe.
app = typer.Typer(
    cls=_Commands,
    context_settings=CONTEXT,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sana-sprint {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Text to pictures in 1 to 4 network evaluations (SANA-Sprint).

    Start with: sana-sprint generate "two apples on a blue background"
    """
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def main() -> None:
    """Run the command line and exit."""
    app()
