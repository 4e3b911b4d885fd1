"""Every failure as an OpenAI error object with its status: `{"error": {"message", "type", "param", "code"}}`.

422: the request does not fit the schema (a missing, unknown or mistyped field). 400: it cannot be read, or asks for
something that this server or model does not do. 429 and 503 say in Retry-After when to try again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from typing import Any

from asgi_correlation_id import correlation_id
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from sana_sprint.pipelines.latents import is_out_of_memory
from sana_sprint.precision import NonFiniteError
from sana_sprint.serve.engine.job import Busy, Draining, ModelUnavailable

SHOWN_PARAM = 100  # characters of a field's name, which the client chose, in an answer
RETRY_LATER_S = 5  # when the server restarts or its model is away


class ApiError(Exception):
    """An error answer. `param` names the request's field."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(_encodable(message))
        self.status = status
        self.code = code
        self.param = None if param is None else _encodable(param)
        self.headers = dict(headers or {})

    @property
    def content(self) -> dict[str, Any]:
        """The JSON body."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.content, self.status, headers=self.headers)


def _encodable(text: str) -> str:
    """Without lone surrogates, which JSON can carry into a request and UTF-8 cannot carry back."""
    return text.encode(errors="replace").decode()


def as_api_error(error: BaseException) -> ApiError:
    """The client's view of an exception of the engine, of the framework or of a request's checks."""
    match error:
        case ApiError():
            return error
        case Busy():
            after = {"Retry-After": str(math.ceil(error.retry_after_s))}
            return ApiError(429, str(error), code="queue_full", headers=after)
        case Draining() | ModelUnavailable():
            code = "shutting_down" if isinstance(error, Draining) else "model_unavailable"
            return ApiError(503, str(error), code=code, headers={"Retry-After": str(RETRY_LATER_S)})
        case CancelledError():
            return ApiError(410, "the job was cancelled", code="cancelled")
        case RequestValidationError() | ValidationError():
            return _invalid(error)
        case HTTPException():
            return _of_http(error)
        case ValueError():
            return ApiError(400, str(error), code="invalid_value")
        case NonFiniteError():
            return ApiError(500, str(error), code="non_finite")
    if is_out_of_memory(error):
        return ApiError(503, "not enough memory for this request: ask for less", code="out_of_memory")
    return _internal_error()


def _internal_error() -> ApiError:
    return ApiError(500, "internal error; the server's log has more", code="internal_error")


def _invalid(error: RequestValidationError | ValidationError) -> ApiError:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not JSON", code="invalid_json")
    param = ".".join(str(part) for part in first["loc"] if part != "body")[:SHOWN_PARAM] or None
    message = first["msg"].removeprefix("Value error, ")
    code = "unknown_parameter" if first["type"] == "extra_forbidden" else "invalid_value"
    if code == "unknown_parameter":
        message = "unknown parameter"
    return ApiError(422, f"{param}: {message}" if param else message, code=code, param=param)


def _of_http(error: HTTPException) -> ApiError:
    codes = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}
    code = codes.get(error.status_code, "invalid_request")
    return ApiError(error.status_code, str(error.detail), code=code, headers=error.headers)


def add_error_handlers(app: FastAPI, refused: Callable[[str], None]) -> None:
    """Make the app answer every exception with an error object; `refused` is called with its code."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        found = as_api_error(error)
        refused(found.code)
        return found.response()

    async def answer_defect(request: Request, _: Exception) -> JSONResponse:
        response = await answer(request, _internal_error())
        response.headers["x-request-id"] = (
            correlation_id.get() or ""
        )  # it is sent from outside the middleware
        return response

    for kind in (HTTPException, RequestValidationError, ApiError):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(
        Exception, answer_defect
    )  # a ValueError that nobody expected is no client's mistake
