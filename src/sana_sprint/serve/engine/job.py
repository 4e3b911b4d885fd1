"""Request, job handle and result of the engine.

A job's state lives in its future: cancelling the job cancels the future, which the engine checks. So there is one
source of truth, and awaiting a job in asyncio (`asyncio.wrap_future`) cancels it when the awaiting task is cancelled.
"""

from __future__ import annotations

import logging
import math
import operator
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image

from sana_sprint.controls import check_kind
from sana_sprint.noise import check_seed, image_seeds, system_seed
from sana_sprint.resolutions import Size

logger = logging.getLogger(__name__)

Status = Literal["queued", "running", "done", "failed", "cancelled"]


class Busy(Exception):  # noqa: N818  (a state of the server, not a fault)
    """The queue is full; trying again makes sense after `retry_after_s` seconds."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the queue is full; try again in {math.ceil(retry_after_s)} s")
        self.retry_after_s = retry_after_s


class Draining(Exception):  # noqa: N818
    """The engine is shutting down: it finishes its queue and refuses new jobs."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down")


class ModelUnavailable(Exception):  # noqa: N818
    """The model could not be loaded; the message says why."""


# ----- the request ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ImageRequest:
    """`n` pictures of one prompt.

    prompt: may be empty.
    steps: network evaluations, from 1 up.
    guidance_scale: from 0 up; None for the model's default.
    seed: picture i has seed + i; None for random ones, which the result names.
    n: pictures, from 1 up.
    height, width: pixels; None for the model's native side.
    image: a sketch or other picture to follow, uint8 (H,W,3) of any size, for models with a ControlNet.
    control_kind: how `image` becomes a control picture, see `controls.control_picture`.
    control_scale: how closely to follow `image`, from 0 up.

    Raises ValueError for anything else, before a job exists. Limits (how large, how many) are the server's business.
    """

    prompt: str
    steps: int = 1
    guidance_scale: float | None = None
    seed: int | None = None
    n: int = 1
    height: int | None = None
    width: int | None = None
    image: np.ndarray | None = None
    control_kind: str = "scribble"
    control_scale: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            raise ValueError(f"prompt must be a string, got: {self.prompt!r}")
        for name in ("steps", "n", "height", "width"):
            if not _is_whole(value := getattr(self, name), optional=name in ("height", "width")):
                raise ValueError(f"{name} must be a whole number from 1 up, got: {value!r}")
        for name in ("guidance_scale", "control_scale"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:  # false for NaN too
                raise ValueError(f"{name} must be finite and at least 0, got: {value!r}")
        if self.seed is not None:
            check_seed(self.seed, self.n)  # the seeds are listed once the server's limit on n was checked
        check_kind(self.control_kind)
        image = self.image
        if image is not None and not (
            image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size
        ):
            raise ValueError(f"image must be uint8 (H,W,3), got: {image.dtype} {image.shape}")


def _is_whole(value: object, *, optional: bool) -> bool:
    if value is None:
        return optional
    try:
        return operator.index(value) >= 1  # type: ignore[arg-type]  # its TypeError is the check
    except TypeError:
        return False


# ----- the result -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Result:
    """The pictures of one request, and everything needed to reproduce them.

    seeds: one per picture, each of which makes that picture again by itself.
    times: the TrigFlow angles, from the first to 0.
    sizes: of the pictures, and what the model drew before resizing; the same for all.
    timings: seconds by stage: "queue", "text", "steps", "decode". The last three are those of the whole batch.
    guidance_scale: None if the model has none.
    lost_tokens: how many tokens at the prompt's end were cut off.
    dtype: the transformer's, such as "bfloat16".
    untaught_words: of the prompt, those that the model's vocabulary lacks; none if it has no vocabulary.
    """

    images: list[Image.Image]
    seeds: tuple[int, ...]
    times: tuple[float, ...]
    sizes: Size
    timings: dict[str, float]
    guidance_scale: float | None
    lost_tokens: int
    dtype: str
    untaught_words: tuple[str, ...] = ()


# ----- the job --------------------------------------------------------------------------------------------------------


class Job:
    """Handle of a submitted request. All methods may be called from any thread.

    has_image: whether the request came with a picture to follow, which it holds until the job's last drawing has ended.
    future: gives the `Result`, or raises the error, or CancelledError after `cancel`.
    seeds: one per picture.
    position: how many jobs are ahead in the queue; 0 once it runs.
    """

    def __init__(self, request: ImageRequest) -> None:
        self.id = secrets.token_hex(12)
        self.request = request
        self.has_image = request.image is not None
        self.seeds = tuple(image_seeds(system_seed() if request.seed is None else request.seed, request.n))
        self.submitted = time.monotonic()
        self.future: Future[Result] = Future()
        self.position = 0
        self._started: float | None = None
        self._steps_done = 0
        self._listeners: list[Callable[[Job], None]] = []
        self._lock = threading.Lock()
        self.ended: float | None = None  # on the clock of `submitted`
        self.future.add_done_callback(lambda _: self._end())

    @property
    def status(self) -> Status:
        """queued, running, done, failed or cancelled."""
        if self.future.cancelled():
            return "cancelled"
        if self.future.done():
            return "done" if self.future.exception() is None else "failed"
        return "queued" if self._started is None else "running"

    @property
    def progress(self) -> tuple[int, int]:
        """(done, total) network evaluations, summed over the request's pictures."""
        return self._steps_done, self.request.steps * self.request.n

    @property
    def queue_s(self) -> float:
        """Seconds spent waiting, so far or until it began."""
        return (time.monotonic() if self._started is None else self._started) - self.submitted

    def cancel(self) -> bool:
        """Cancel the job; False if it has ended. A running one stops at its next step or decoder tile."""
        return self.future.cancel()

    def subscribe(self, listener: Callable[[Job], None]) -> Callable[[], None]:
        """Call `listener(job)` at once and whenever status, progress or position change, the last time when the job ends.

        It is called in whatever thread makes the change and must return quickly; in asyncio use
        `loop.call_soon_threadsafe`. Returns a function that ends the subscription.
        """
        with self._lock:
            self._listeners.append(listener)
        self._call(listener)

        def unsubscribe() -> None:
            with self._lock:
                if listener in self._listeners:
                    self._listeners.remove(listener)

        return unsubscribe

    # ----- for the engine ---------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Mark it as running: it left the queue, or its batch failed and it is drawn again by itself."""
        if self._started is None:
            self._started = time.monotonic()
        self.position = self._steps_done = 0
        self._tell()

    def advance(self, steps: int) -> None:
        """Count `steps` more network evaluations as done."""
        self._steps_done += steps
        self._tell()

    def move_to(self, position: int) -> None:
        """Set the number of jobs ahead of it."""
        if position != self.position:
            self.position = position
            self._tell()

    def finish(self, outcome: Result | Exception) -> None:
        """Set the result or the error, unless the job was cancelled before."""
        if self.future.done() or not self.future.set_running_or_notify_cancel():
            return
        if isinstance(outcome, Exception):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)

    def release_image(self) -> None:
        """Drop the request's picture: nothing will be drawn from it any more, and an ended job may be kept for long."""
        if self.request.image is not None:
            self.request = replace(self.request, image=None)

    def _end(self) -> None:
        self.ended = time.monotonic()
        self._tell()

    def _tell(self) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            self._call(listener)

    def _call(self, listener: Callable[[Job], None]) -> None:
        try:
            listener(self)
        except Exception:  # such as a closed event loop; drawing goes on
            logger.exception("a listener of job %s failed", self.id)
