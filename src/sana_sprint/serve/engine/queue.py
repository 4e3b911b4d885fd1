"""The engine: one thread that owns the model, and the queue in front of it.

Callers hand in an immutable `ImageRequest` and get a `Job`. The thread takes the oldest job, waits a few milliseconds
for others of the same shape, and draws them in one batch, in which each picture equals the one it would be alone.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import torch

from sana_sprint.pipelines.text_to_image import SanaSprintPipeline
from sana_sprint.serve.engine.batch import ModelFacts, Pipelines, PromptCache, draw_jobs, shape
from sana_sprint.serve.engine.job import Busy, Draining, ImageRequest, Job, ModelUnavailable

logger = logging.getLogger(__name__)

Load = Callable[[], Pipelines | SanaSprintPipeline]
State = Literal["loading", "ready", "unloaded", "failed", "draining", "stopped"]

FIRST_GUESS_S = 1.0  # seconds for a batch, before one was measured
MEMORY = 0.8  # share that the older batches keep in the running mean of seconds per batch


@dataclass(frozen=True)
class BatchReport:
    """A finished batch: pictures in it, and seconds by stage ("text", "steps", "decode")."""

    pictures: int
    seconds: dict[str, float]


class Engine:
    """Draws requests on one thread, which starts with the engine and loads the model at once.

    Args:
        load: makes the model; called on the engine's thread, again after an idle unload or a failure.
        max_queue: waiting jobs; more are refused with `Busy`.
        batch_window_s: how long the oldest job waits for others of its shape. 0 takes only those already waiting.
        max_batch: pictures in the network at once.
        idle_unload_s: free the model's memory after this long without a job; None to keep it.
        cache_prompts: how many prompts' embeddings are kept.

    `on_submit` functions are called with each job that was accepted, `on_batch` functions on the engine's thread after each
    batch.
    """

    def __init__(
        self,
        load: Load,
        *,
        max_queue: int = 64,
        batch_window_s: float = 0.005,
        max_batch: int = 16,
        idle_unload_s: float | None = None,
        cache_prompts: int = 256,
    ) -> None:
        if max_queue < 1 or max_batch < 1 or cache_prompts < 0 or batch_window_s < 0:
            raise ValueError(
                "max_queue and max_batch must be at least 1, cache_prompts and batch_window_s at least 0; "
                f"got: {max_queue}, {max_batch}, {cache_prompts}, {batch_window_s}"
            )
        self.max_batch = max_batch
        self.max_queue = max_queue
        self.on_submit: list[Callable[[Job], None]] = []
        self.on_batch: list[Callable[[BatchReport], None]] = []
        self.facts: ModelFacts | None = None  # None until the model was loaded once
        self._load = load
        self._batch_window_s = batch_window_s
        self._idle_unload_s = idle_unload_s
        self._cache = PromptCache(cache_prompts)
        self._pipelines: Pipelines | None = None
        self._state: State = "loading"
        self._closing = False
        self._changed = threading.Condition()  # guards the fields below, and is notified of every change
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._batch_s = FIRST_GUESS_S
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ----- for callers, from any thread -------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """loading, ready, unloaded (the next job loads again), failed (so did loading), draining or stopped."""
        if not self._closing:
            return self._state
        return "draining" if self._thread.is_alive() else "stopped"

    @property
    def queued(self) -> int:
        """Number of waiting jobs."""
        return len(self._waiting)

    def submit(self, request: ImageRequest) -> Job:
        """Put a request in the queue.

        Raises:
            ValueError: if the model cannot honour it; before the model was loaded once, the job fails with that.
            Busy: if the queue is full.
            Draining: after `close`.
        """
        if self.facts is not None:
            self.facts.check(request)
        job = Job(request)
        with self._changed:
            if self._closing:
                raise Draining
            if len(self._waiting) >= self.max_queue:
                raise Busy(self._retry_after_s())
            job.position = len(self._waiting)
            self._waiting.append(job)
            self._changed.notify_all()
        job.future.add_done_callback(lambda _: self._forget(job))
        for tell in self.on_submit:
            tell(job)
        return job

    def close(self, timeout_s: float | None = None) -> None:
        """Refuse new jobs, finish the queue, end the thread and free the model.

        Jobs left after `timeout_s` are cancelled. Returns when the thread has ended.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        with self._changed:
            left = [*self._running, *self._waiting]
        for job in left:
            job.cancel()
        self._thread.join()

    def wait_until_loaded(self, timeout_s: float | None = None) -> bool:
        """Wait for the first load to end; True if it succeeded."""
        with self._changed:
            self._changed.wait_for(lambda: self._state != "loading", timeout_s)
        return self._state == "ready"

    # ----- the queue --------------------------------------------------------------------------------------------------

    def _retry_after_s(self) -> float:
        """Estimated seconds until the queue has room: its pictures at the pace of the last batches."""
        pictures = sum(job.request.n for job in self._waiting)
        return max(1.0, pictures / self.max_batch * self._batch_s)

    def _forget(self, job: Job) -> None:
        """Remove a job that ended while it waited: it was cancelled."""
        with self._changed:
            if job not in self._waiting:
                return
            self._waiting.remove(job)
            self._changed.notify_all()
        job.release_image()
        self._renumber()

    def _renumber(self) -> None:
        for position, job in enumerate(list(self._waiting)):
            job.move_to(position)

    def _next_batch(self) -> list[Job] | None:
        """The oldest job and others of its shape; None when closing. Unloads the model after the idle time."""
        while True:
            with self._changed:
                patience = self._idle_unload_s if self._pipelines is not None else None
                self._changed.wait_for(lambda: self._waiting or self._closing, patience)
                if self._waiting:
                    self._running = self._collect()
                    break
                if self._closing:
                    return None
            self._unload()
        self._renumber()
        return self._running

    def _collect(self) -> list[Job]:
        """Take a batch from the queue, with the lock held; empty if its jobs were cancelled meanwhile."""
        native = None if self.facts is None else self.facts.native
        first = self._waiting[0]
        wanted = shape(first.request, native)
        deadline = first.submitted + self._batch_window_s
        while True:
            batch, pictures = [], 0
            for job in self._waiting:
                if shape(job.request, native) != wanted:
                    continue
                if pictures and pictures + job.request.n > self.max_batch:
                    break
                batch.append(job)
                pictures += job.request.n
            left = deadline - time.monotonic()
            if pictures >= self.max_batch or left <= 0 or self._closing:
                break
            self._changed.wait(left)
        self._waiting = [job for job in self._waiting if job not in batch]
        return batch

    # ----- the engine's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        with suppress(ModelUnavailable):  # logged, and shown by `state`; the next job tries again
            self._loaded()
        while (batch := self._next_batch()) is not None:
            self._draw(batch)
            for job in batch:
                job.release_image()
            self._running = []
        self._unload()

    def _draw(self, jobs: Sequence[Job]) -> None:
        """Draw a batch. If it fails, draw each job by itself, so that only the one at fault fails."""
        jobs = [job for job in jobs if not job.future.done()]
        if not jobs:
            return
        for job in jobs:
            job.begin()
        started = time.monotonic()
        try:
            results, seconds = draw_jobs(self._loaded(), self._cache, jobs, self.max_batch)
        except Exception as error:
            self._recover(jobs, error)
            return
        self._batch_s = MEMORY * self._batch_s + (1 - MEMORY) * (time.monotonic() - started)
        report = BatchReport(sum(job.request.n for job in results), seconds)
        for job, result in results.items():
            job.finish(result)
        for tell in self.on_batch:
            try:
                tell(report)
            except Exception:
                logger.exception("a listener of the engine failed")

    def _recover(self, jobs: Sequence[Job], error: Exception) -> None:
        _drop_frames(error)  # they hold the failed batch's tensors, and a failed job may be kept for long
        _free_memory()
        if len(jobs) > 1 and not isinstance(error, ModelUnavailable):
            logger.warning("a batch of %d jobs failed, drawing them one by one: %s", len(jobs), error)
            for job in jobs:
                self._draw([job])
            return
        if not isinstance(error, ValueError | ModelUnavailable):
            logger.error("job %s failed: %s: %s", jobs[0].id, type(error).__name__, error)
        for job in jobs:
            job.finish(error)

    def _loaded(self) -> Pipelines:
        """The model, loaded if it is not. Raises ModelUnavailable if that fails."""
        if self._pipelines is not None:
            return self._pipelines
        self._set_state("loading")
        try:
            loaded = self._load()
        except Exception as error:
            logger.exception("the model could not be loaded")
            self._set_state("failed")
            raise ModelUnavailable(f"the model could not be loaded: {error}") from error
        self._pipelines = loaded if isinstance(loaded, Pipelines) else Pipelines(loaded)
        self.facts = ModelFacts.of(self._pipelines)
        # Half a million objects of torch and transformers stay: looking through them for garbage would hold up every thread
        # for a quarter of a second, now and then.
        gc.collect()
        gc.freeze()
        self._set_state("ready")
        return self._pipelines

    def _unload(self) -> None:
        self._pipelines = None
        self._cache.clear()
        gc.unfreeze()
        _free_memory()
        self._set_state("unloaded")

    def _set_state(self, state: State) -> None:
        with self._changed:
            self._state = state
            self._changed.notify_all()


def _drop_frames(error: BaseException | None) -> None:
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
