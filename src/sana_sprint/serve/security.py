"""What every request must pass, before any of its body is read: host, origin, key and size.

Plain ASGI, because the usual middleware base class hides from handlers that their client has gone.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sana_sprint.serve.errors import ApiError
from sana_sprint.serve.settings import Settings, is_loopback

# /health, /ready and the page are open; the page's WebSocket asks for the key itself, because browsers cannot set headers.
PROTECTED = ("/v1/", "/metrics")
POLICY_VIOLATION = 1008  # WebSocket close code


class Guard:
    """Refuses what must not come in, and gives each answer an `x-request-id`."""

    def __init__(self, app: ASGIApp, settings: Settings, refused: Callable[[str], None]) -> None:
        self.app = app
        self.settings = settings
        self.refused = refused  # is told the code of each refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):  # the lifespan
            await self.app(scope, receive, send)
            return
        request_id = secrets.token_hex(8)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        if (refusal := self._refusal(scope)) is None:
            await self.app(scope, self._limited(receive), send_with_id)
            return
        self.refused(refusal.code)
        if scope["type"] == "http":
            await refusal.response()(scope, receive, send_with_id)
        else:
            await send({"type": "websocket.close", "code": POLICY_VIOLATION, "reason": str(refusal)})

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
        if self.settings.api_key is None and not is_loopback(host):
            # A page of another name that points to this machine (DNS rebinding) would otherwise be "same origin".
            message = f"without an API key this server answers to localhost only, not to {host!r}"
            return ApiError(403, message, code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            return ApiError(403, "pages of other origins may not use this server", code="wrong_origin")
        if not self._has_key(scope, headers):
            return ApiError(
                401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key"
            )
        size = headers.get("content-length", "0")
        if not size.isdecimal() or int(size) > self.settings.max_body_bytes:
            return ApiError(413, self._too_large, code="too_large")
        return None

    def _has_key(self, scope: Scope, headers: Headers) -> bool:
        key = self.settings.api_key
        if key is None or not scope["path"].startswith(PROTECTED):
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # compare_digest takes the same time wherever the first difference is
        return scheme.lower() == "bearer" and hmac.compare_digest(given.encode(), key.encode())

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
