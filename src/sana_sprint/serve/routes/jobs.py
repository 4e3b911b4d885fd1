"""Jobs: submit now, watch and fetch later. Unlike a plain call, a job goes on when its client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Depends
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from sana_sprint.serve.engine import Job
from sana_sprint.serve.errors import ApiError, as_api_error
from sana_sprint.serve.images import decode_text
from sana_sprint.serve.schema import JobRequest
from sana_sprint.serve.service import Service, call_in


def jobs_routes(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v1/jobs", tags=["jobs"])

    @routes.post("", status_code=202)
    async def submit(fields: JobRequest) -> dict[str, Any]:
        """Submit a job."""
        fields.check(service.settings)
        image = None
        if fields.image is not None:
            image = await run_in_threadpool(decode_text, fields.image, service.settings.max_upload_pixels)
            fields = fields.model_copy(update={"image": None})  # it need not be kept twice
        job = service.submit(fields.request(service.settings, **fields.with_image(image)))
        service.jobs.add(job, fields)
        return describe(job)

    @routes.get("/{job_id}")
    async def look(job_id: str) -> dict[str, Any]:
        """Status and progress of a job."""
        return describe(service.jobs.get(job_id)[0])

    @routes.delete("/{job_id}")
    async def cancel(job_id: str) -> dict[str, Any]:
        """Cancel a job; a running one stops at its next step or decoder tile. An ended job stays as it is."""
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

    def find(job_id: str) -> Job:
        return service.jobs.get(job_id)[0]

    found = Depends(find)  # so that a 404 is sent before the stream begins

    @routes.get("/{job_id}/events", response_class=EventSourceResponse)
    async def events(job: Job = found) -> AsyncIterator[ServerSentEvent]:
        """Server-sent events: what GET of the job gives, at once and on every change, until it ends."""
        async for state in _states(job):
            yield ServerSentEvent(event=state["status"], data=state)

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


async def _states(job: Job) -> AsyncIterator[dict[str, Any]]:
    """A job as JSON at once and after each change, until it ends. Changes that come faster than they are read are one."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    unsubscribe = job.subscribe(lambda _: call_in(loop, changed.set))
    try:
        while True:
            changed.clear()
            state = describe(job)
            yield state
            if state["status"] not in ("queued", "running"):
                return
            await changed.wait()
    finally:
        unsubscribe()
