"""Shared by the routes: submitting requests to the engine, waiting for them, and the answer with the pictures."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from cachetools import TTLCache
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from sana_sprint.serve.engine import Engine, ImageRequest, Job, Result
from sana_sprint.serve.errors import ApiError, as_api_error
from sana_sprint.serve.images import encode, settings_of
from sana_sprint.serve.metrics import Metrics
from sana_sprint.serve.schema import Generation
from sana_sprint.serve.settings import Settings

JOB_BYTES = 2**14  # of an ended job beside its pictures, a prompt of the greatest length included


class Service:
    """One engine with its limits, metrics and kept jobs."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self.settings = settings
        self.metrics = Metrics(engine)
        self.jobs = JobStore(settings)

    def submit(self, request: ImageRequest) -> Job:
        """See `Engine.submit`; errors are ApiErrors."""
        try:
            return self.engine.submit(request)
        except Exception as error:
            raise as_api_error(error) from error

    async def answer(self, job: Job, fields: Generation) -> dict[str, Any]:
        """The body of an answer with the pictures of an ended job. Raises ApiError if it did not end well."""
        try:
            result = job.future.result(timeout=0)
        except Exception as error:
            raise as_api_error(error) from error
        return await run_in_threadpool(_images_response, job, result, fields, self.settings.model)


async def wait_for(job: Job, request: Request) -> None:
    """Return when the job has ended. It is cancelled if the client disconnects first, or the server stops."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    job.future.add_done_callback(lambda _: call_in(loop, ended.set))
    waits = [asyncio.ensure_future(ended.wait()), asyncio.ensure_future(_disconnected(request))]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        job.cancel()  # without effect if it has ended
        for wait in waits:
            wait.cancel()


def call_in(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    """Schedule a call on an event loop from another thread; a closed loop is ignored."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(function)


async def _disconnected(request: Request) -> None:
    """Return when the client has disconnected. The body has been read, so no other message can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def check_fields(model: type[Generation], values: dict[str, Any]) -> Any:
    """`values` as this model; raises ApiError 422."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise as_api_error(error) from error


def _images_response(job: Job, result: Result, fields: Generation, model: str) -> dict[str, Any]:
    output_format = fields.output_format or "png"
    data = []
    for i, image in enumerate(result.images):
        settings = settings_of(job, result, i, model)
        text = base64.b64encode(encode(image, output_format, fields.output_compression, settings)).decode()
        picture = (
            {"url": f"data:image/{output_format};base64,{text}"}
            if fields.response_format == "url"
            else {"b64_json": text}
        )
        data.append({**picture, "seed": result.seeds[i]})
    size = result.sizes
    return {
        "created": int(time.time()),
        "data": data,
        "model": model,
        "output_format": output_format,
        "size": f"{size.width}x{size.height}",
        "drawn_size": f"{size.model_width}x{size.model_height}",
        "steps": job.request.steps,
        "times": list(result.times),
        "guidance_scale": result.guidance_scale,
        "lost_prompt_tokens": result.lost_tokens,
        "untaught_words": list(result.untaught_words),
        "timings": {stage: round(seconds, 4) for stage, seconds in result.timings.items()},
    }


class JobStore:
    """The jobs of the jobs API, with the fields they came with. May be used from any thread.

    Jobs that have not ended stay. Ended ones are kept for `keep_jobs_s` and as long as all of them fit into
    `max_kept_bytes`; those not asked for the longest are dropped first.
    """

    def __init__(self, settings: Settings) -> None:
        self._open: dict[str, tuple[Job, Generation]] = {}
        self._ended: TTLCache[str, tuple[Job, Generation]] = TTLCache(
            settings.max_kept_bytes, settings.keep_jobs_s, getsizeof=lambda kept: _kept_bytes(kept[0])
        )
        self._lock = threading.Lock()  # jobs end on the engine's thread

    def add(self, job: Job, fields: Generation) -> None:
        """Keep a job."""
        with self._lock:
            self._open[job.id] = (job, fields)
        job.subscribe(self._changed)  # before any client does, so none sees the end first

    def get(self, job_id: str) -> tuple[Job, Generation]:
        """A job and its fields; ApiError 404 if there is none of this name, or none any more."""
        with self._lock:
            self._ended.expire()
            found = self._open.get(job_id) or self._ended.get(job_id)
        if found is None:
            raise ApiError(404, f"there is no job {job_id[:40]!r}, or it is gone", code="job_not_found")
        return found

    def _changed(self, job: Job) -> None:
        if job.ended is None:
            return
        with self._lock:
            if (kept := self._open.pop(job.id, None)) is not None:
                with suppress(ValueError):  # it is larger than all that may be kept
                    self._ended[job.id] = kept


def _kept_bytes(job: Job) -> int:
    """Memory of an ended job: its pictures as they are, and some for the rest."""
    if job.status != "done":
        return JOB_BYTES
    pictures = job.future.result(timeout=0).images
    return JOB_BYTES + sum(picture.width * picture.height * len(picture.getbands()) for picture in pictures)
