"""Checks of every request before any of its body is read: host, origin, API key and size; and headers of every answer.

Plain ASGI, because the usual middleware base class hides from handlers that their client has gone. Not Starlette's
TrustedHostMiddleware, which takes a list of names (127.0.0.2 is this machine too) and answers 400 in plain text; nor a
dependency for the key, because FastAPI reads the whole body before it calls dependencies.
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Callable
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sana_sprint.serve.errors import ApiError
from sana_sprint.serve.settings import Settings, is_loopback

# /health, /ready and the page are open; the page's WebSocket asks for the key itself, because browsers cannot set headers.
PROTECTED = ("/v1/", "/metrics")
POLICY_VIOLATION = 1008  # WebSocket close code
REQUEST_ID = re.compile(r"[0-9A-Za-z._-]{1,64}")


def is_key(given: str, settings: Settings) -> bool:
    """Whether a client's key is the server's, if the server has one. Takes the same time wherever the first difference is."""
    if settings.api_key is None:
        return True
    key = settings.api_key.get_secret_value()
    return hmac.compare_digest(given.encode(errors="surrogatepass"), key.encode())


def new_request_id() -> str:
    """16 random hexadecimal digits."""
    return secrets.token_hex(8)


def request_id(given: str) -> str:
    """A client's `x-request-id`, such as a proxy's, if it can be logged safely; else a new one."""
    return given if REQUEST_ID.fullmatch(given) else new_request_id()


class Guard:
    """Checks host, origin, API key and body size, and keeps answers from being stored or taken for other types."""

    def __init__(self, app: ASGIApp, settings: Settings, refused: Callable[[str], None]) -> None:
        self.app = app
        self.settings = settings
        self.refused = refused  # called with the code of each refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):  # the lifespan
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-content-type-options"] = "nosniff"
                if scope["path"].startswith(PROTECTED):
                    headers["cache-control"] = "no-store"
            await send(message)

        if (refusal := self._refusal(scope)) is None:
            await self.app(scope, self._limited(receive), send_with_headers)
            return
        self.refused(refusal.code)
        if scope["type"] == "http":
            await refusal.response()(scope, receive, send_with_headers)
        else:
            await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": str(refusal)})

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        host = _split(f"//{headers.get('host', '')}").hostname or ""
        if self.settings.api_key is None and not is_loopback(host):
            # A page of another name that points to this machine (DNS rebinding) would otherwise be "same origin".
            message = f"without an API key this server answers to localhost only, not to {host!r}"
            return ApiError(403, message, code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and (_split(origin).netloc or None) != headers.get("host", ""):
            return ApiError(403, "pages of other origins may not use this server", code="wrong_origin")
        if not self._has_key(scope, headers):
            message = "a valid API key is needed: Authorization: Bearer KEY"
            return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        size = headers.get("content-length", "0")
        if not re.fullmatch(r"\d{1,18}", size, re.ASCII) or int(size) > self.settings.max_body_bytes:
            return ApiError(413, self._too_large, code="too_large")
        return None

    def _has_key(self, scope: Scope, headers: Headers) -> bool:
        if self.settings.api_key is None or not scope["path"].startswith(PROTECTED):
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and is_key(given, self.settings)

    def _limited(self, receive: Receive) -> Receive:
        """Counts the body as it comes: its announced length may be missing or a lie."""
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b"")) if message["type"] == "http.request" else 0
            if seen > self.settings.max_body_bytes:
                raise HTTPException(413, self._too_large)
            return message

        return counted

    @property
    def _too_large(self) -> str:
        return f"the request's body is larger than {self.settings.max_body_bytes} bytes"


def _split(url: str) -> SplitResult:
    """Its parts, all empty if it is malformed, such as "http://["."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")
