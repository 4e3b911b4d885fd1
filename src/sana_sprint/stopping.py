"""Ending a call early: without a result, by a function `should_stop`, or with what the last step gave, by `Interrupt`."""

from __future__ import annotations

from collections.abc import Callable

ShouldStop = Callable[[], bool]


class Stopped(Exception):  # noqa: N818  (no error: the caller asked for it)
    """A call ended early because its `should_stop` returned True."""


class Interrupt(Exception):  # noqa: N818  (no error either)
    """Raised after a step of a sampler: no more steps, and the clean estimate of this one is the result."""


def stop_if(should_stop: ShouldStop | None) -> None:
    """Raises Stopped if `should_stop` is given and returns True."""
    if should_stop is not None and should_stop():
        raise Stopped
