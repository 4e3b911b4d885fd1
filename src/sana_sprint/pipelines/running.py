"""Calls that are running: their numbers, under the published names, and their interruption.

A published pipeline keeps these in itself, one call at a time. Here several threads may call one pipeline, so each call has a
`RunningCall` of its own, and a pipeline finds a thread's call by the thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False)
class RunningCall:
    """One call. guidance_scale and attention_kwargs are as given; `interrupt` ends it after the step that is computed."""

    guidance_scale: Any
    attention_kwargs: Mapping[str, Any] | None
    num_timesteps: int
    interrupt: bool = False
    steps_done: int = 0


class CallAttributes:
    """Published attributes of a pipeline's call: in a callback that call's, elsewhere those of the call that began last.

    `pipe._interrupt = True` in a callback ends its call after this step, with the picture as it then is. From a thread that
    is not in a call of this pipeline it ends all calls that are running. A new call begins uninterrupted.
    """

    _calls: dict[int, list[RunningCall]]  # of each thread, the innermost last
    _last_call: RunningCall | None

    @property
    def guidance_scale(self) -> Any:
        """The call's argument. AttributeError before the first call, as published; so do the next two."""
        return self._known_call().guidance_scale

    @property
    def _guidance_scale(self) -> Any:
        return self.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, value: Any) -> None:
        # Published callbacks write it, without effect on the picture there too: its guidance is embedded once.
        self._known_call().guidance_scale = value

    @property
    def attention_kwargs(self) -> Mapping[str, Any] | None:
        """The call's argument."""
        return self._known_call().attention_kwargs

    @property
    def num_timesteps(self) -> int:
        """The call's number of steps."""
        return self._known_call().num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the call was interrupted."""
        call = self._call()
        return call is not None and call.interrupt

    @property
    def _interrupt(self) -> bool:
        return self.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        own = self._calls.get(threading.get_ident())
        running = own[-1:] if own else [call for calls in list(self._calls.values()) for call in list(calls)]
        for call in running:
            call.interrupt = bool(value)

    @contextmanager
    def _running(self, call: RunningCall) -> Iterator[RunningCall]:
        """Context in which this thread is in `call`."""
        thread = threading.get_ident()
        calls = self._calls.setdefault(thread, [])
        calls.append(call)
        self._last_call = call
        try:
            yield call
        finally:
            calls.pop()
            if not calls:
                del self._calls[thread]

    def _call(self) -> RunningCall | None:
        own = self._calls.get(threading.get_ident())
        return own[-1] if own else self._last_call

    def _known_call(self) -> RunningCall:
        call = self._call()
        if call is None:
            raise AttributeError("the pipeline was not called yet")
        return call
