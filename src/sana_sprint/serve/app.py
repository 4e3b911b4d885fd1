"""The HTTP server: health, metrics, the APIs and the page, in front of an engine.

Handlers never block on the engine's thread, they await jobs; so `/health` answers whatever the engine does.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio.to_thread
from asgi_correlation_id import CorrelationIdMiddleware
from fastapi import APIRouter, FastAPI
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from sana_sprint import __version__
from sana_sprint.serve.engine import Engine
from sana_sprint.serve.errors import add_error_handlers
from sana_sprint.serve.metrics import CONTENT_TYPE
from sana_sprint.serve.routes.images import images_routes
from sana_sprint.serve.routes.jobs import jobs_routes
from sana_sprint.serve.routes.realtime import add_realtime
from sana_sprint.serve.security import Guard, new_request_id, request_id
from sana_sprint.serve.service import Service
from sana_sprint.serve.settings import Settings

READY = ("ready", "unloaded")  # an unloaded model comes back with the next request


def create_app(engine: Engine, settings: Settings) -> FastAPI:
    """An ASGI app. On shutdown it lets the engine finish its queue and closes it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # A batch's pictures are ready at the same moment. Encoded by as many threads, they would compete with the
        # event loop, which would then answer late.
        anyio.to_thread.current_default_thread_limiter().total_tokens = max(2, os.cpu_count() or 1)
        yield
        await run_in_threadpool(engine.close, settings.drain_s)

    # The interactive documentation pages would load their scripts from elsewhere; /openapi.json is all they show.
    app = FastAPI(title="sana-sprint", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    service = Service(engine, settings)
    app.add_middleware(Guard, settings=settings, refused=service.metrics.refused)
    app.add_middleware(
        CorrelationIdMiddleware,
        header_name="x-request-id",
        generator=new_request_id,
        validator=None,  # it would write a line to the log for each id that it refuses
        transformer=request_id,
    )
    add_error_handlers(app, service.metrics.refused)
    app.include_router(_state_routes(service))
    app.include_router(images_routes(service))
    app.include_router(jobs_routes(service))
    add_realtime(app, engine, settings)
    return app


def _state_routes(service: Service) -> APIRouter:
    routes = APIRouter(tags=["state"])

    @routes.get("/health")
    @routes.head("/health", include_in_schema=False)
    async def health() -> dict[str, str]:
        """Answers as long as the process runs."""
        return {"status": "ok", "version": __version__}

    @routes.get("/ready")
    @routes.head("/ready", include_in_schema=False)
    async def ready() -> JSONResponse:
        """200 if a request would be drawn, else 503."""
        state = service.engine.state
        return JSONResponse({"status": state}, 200 if state in READY else 503)

    @routes.get("/metrics")
    async def metrics() -> Response:
        """Metrics in Prometheus' text format."""
        content: Any = service.metrics.text()
        return Response(content, media_type=CONTENT_TYPE)

    return routes
