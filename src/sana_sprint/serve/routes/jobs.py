"""Jobs: submit now, watch and fetch later. Unlike a plain call, a job goes on when its client goes away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from sana_sprint.serve.engine import Job
from sana_sprint.serve.errors import ApiError, as_api_error
from sana_sprint.serve.images import decode_text
from sana_sprint.serve.schema import JobRequest
from sana_sprint.serve.service import Service, call_in

KEEP_ALIVE_S = 15.0  # proxies close streams that are silent for longer


def jobs_routes(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v1/jobs", tags=["jobs"])

    @routes.post("", status_code=202)
    async def submit(fields: JobRequest) -> dict[str, Any]:
        """Put a job into the queue."""
        image = None
        if fields.image is not None:
            image = await run_in_threadpool(decode_text, fields.image, service.settings.max_upload_pixels)
            fields = fields.model_copy(update={"image": None})  # it need not be kept twice
        job = service.submit(fields.request(service.settings, **fields.with_image(image)))
        service.jobs.add(job, fields)
        return describe(job)

    @routes.get("/{job_id}")
    async def look(job_id: str) -> dict[str, Any]:
        """How far it is."""
        return describe(service.jobs.get(job_id)[0])

    @routes.delete("/{job_id}")
    async def cancel(job_id: str) -> dict[str, Any]:
        """Give it up; a running job stops at its next step or tile. An ended job stays as it is."""
        job, _ = service.jobs.get(job_id)
        job.cancel()
        return describe(job)

    @routes.get("/{job_id}/result")
    async def result(job_id: str) -> dict[str, Any]:
        """The answer that `/v1/images/generations` would have given; 409 as long as there is none."""
        job, fields = service.jobs.get(job_id)
        if not job.future.done():
            raise ApiError(409, f"the job is {job.status}", code="not_done", headers={"Retry-After": "1"})
        return await service.answer(job, fields)

    @routes.get("/{job_id}/events", response_class=StreamingResponse)
    async def events(job_id: str) -> StreamingResponse:
        """Server-sent events: what GET of the job gives, at once and on every change, until it ends."""
        job, _ = service.jobs.get(job_id)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(_events(job), media_type="text/event-stream", headers=headers)

    return routes


def describe(job: Job) -> dict[str, Any]:
    """A job as JSON."""
    done, total = job.progress
    error = None
    if job.status == "failed":
        failure = job.future.exception()
        error = None if failure is None else as_api_error(failure).content["error"]
    return {
        "id": job.id,
        "object": "job",
        "status": job.status,
        "position": job.position,
        "progress": {"done": done, "total": total},
        "seeds": list(job.seeds),
        "error": error,
    }


async def _events(job: Job) -> AsyncIterator[str]:
    """One event per change, named by the status. Changes that come faster than they are sent fold into one."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    unsubscribe = job.subscribe(lambda _: call_in(loop, changed.set))
    try:
        while True:
            changed.clear()
            state = describe(job)
            yield f"event: {state['status']}\ndata: {json.dumps(state)}\n\n"
            if state["status"] not in ("queued", "running"):
                return
            while not changed.is_set():
                try:
                    await asyncio.wait_for(changed.wait(), KEEP_ALIVE_S)
                except TimeoutError:
                    yield ": still here\n\n"
    finally:
        unsubscribe()
