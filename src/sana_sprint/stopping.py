"""Ending a call early: a function `should_stop`, asked between pieces of work."""

from __future__ import annotations

from collections.abc import Callable

ShouldStop = Callable[[], bool]


class Stopped(Exception):  # noqa: N818  (no error: the caller asked for it)
    """A call ended early because its `should_stop` returned True."""


def stop_if(should_stop: ShouldStop | None) -> None:
    """Raises Stopped if `should_stop` is given and returns True."""
    if should_stop is not None and should_stop():
        raise Stopped
