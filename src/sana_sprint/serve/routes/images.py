"""OpenAI's images API: `/v1/images/generations`, `/v1/images/edits`, `/v1/models`."""

from __future__ import annotations

from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from sana_sprint.serve.engine.batch import NO_CONTROL
from sana_sprint.serve.errors import ApiError
from sana_sprint.serve.images import decode_upload
from sana_sprint.serve.schema import Edit, Generation
from sana_sprint.serve.service import Service, check_fields, wait_for
from sana_sprint.serve.settings import Settings

IMAGE_FIELDS = ("image", "image[]")  # OpenAI's client sends the second for a list
_EDIT_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["prompt", "image"],
                    "properties": {
                        **Edit.model_json_schema()["properties"],
                        "image": {"type": "string", "format": "binary"},
                    },
                }
            }
        },
    }
}


def images_routes(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])

    @routes.post("/images/generations")
    async def generate(fields: Generation, request: Request) -> dict[str, Any]:
        """Draw pictures of a prompt. Work stops when the client goes away."""
        job = service.submit(fields.request(service.settings))
        await wait_for(job, request)
        return await service.answer(job, fields)

    @routes.post("/images/edits", openapi_extra=_EDIT_BODY)
    async def edit(request: Request) -> dict[str, Any]:
        """Draw pictures of a prompt that follow a sketch or another picture."""
        facts = service.engine.facts
        if facts is not None and not facts.has_control:
            raise ApiError(400, NO_CONTROL, code="no_controlnet", param="image")
        fields, image = await _read_form(request, service.settings)
        job = service.submit(fields.request(service.settings, **fields.with_image(image)))
        await wait_for(job, request)
        return await service.answer(job, fields)

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [_model(service)]}

    @routes.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """The model, if it is the one that is served."""
        if name != service.settings.model:
            message = f"there is no model {name[:80]!r} here, only {service.settings.model!r}"
            raise ApiError(404, message, code="model_not_found", param="model")
        return _model(service)

    return routes


def _model(service: Service) -> dict[str, Any]:
    """OpenAI's model object, and the server's limits. `native_size` is null until the model was loaded once."""
    settings, facts = service.settings, service.engine.facts
    return {
        "id": settings.model,
        "object": "model",
        "created": 0,
        "owned_by": "sana-sprint",
        "native_size": None if facts is None else facts.native,
        "edits": None if facts is None else facts.has_control,
        "limits": {
            "n": settings.max_n,
            "steps": settings.max_steps,
            "pixels": settings.max_pixels,
            "prompt_characters": settings.max_prompt_chars,
            "body_bytes": settings.max_body_bytes,
        },
    }


async def _read_form(request: Request, settings: Settings) -> tuple[Edit, np.ndarray]:
    """The fields and the one image of a multipart body."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(400, "the body must be multipart/form-data", code="invalid_form")
    async with request.form(max_files=2, max_fields=40) as form:
        files = [value for key in IMAGE_FIELDS for value in form.getlist(key)]
        if form.getlist("mask"):
            raise ApiError(400, "this server does not inpaint: leave mask out", code="no_mask", param="mask")
        if len(files) != 1 or not isinstance(files[0], UploadFile):
            message = f"there must be one file named image, got: {len(files)}"
            raise ApiError(400, message, code="one_image", param="image")
        values = {key: value for key, value in form.items() if key not in IMAGE_FIELDS}
        fields = check_fields(Edit, values)
        fields.check(settings)
        data = await files[0].read()
    return fields, await run_in_threadpool(decode_upload, data, settings.max_upload_pixels)
