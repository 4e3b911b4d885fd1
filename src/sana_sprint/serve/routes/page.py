"""The page's files: plain HTML, CSS and ES modules out of `web/`, with headers that allow nothing from elsewhere."""

from __future__ import annotations

import mimetypes
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from fastapi.staticfiles import StaticFiles

# Nothing from elsewhere, nothing inline; pictures that the page itself made are blobs. `connect-src 'self'` is the
# socket.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # after an upgrade old modules must not meet new ones
}
# Not left to the machine's tables, some of which call scripts plain text, which browsers then do not run.
MEDIA_TYPES = {
    ".js": "text/javascript",
    ".css": "text/css",
    ".html": "text/html",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".webp": "image/webp",
}


class PageFiles(StaticFiles):
    """The files of `web/` with the page's headers."""

    def __init__(self) -> None:
        for ending, media_type in MEDIA_TYPES.items():
            mimetypes.add_type(media_type, ending)
        super().__init__(packages=[("sana_sprint.serve", "web")])

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """A file, or 304 if the browser has it, with `HEADERS`."""
        response = super().file_response(*args, **kwargs)
        response.headers.update(HEADERS)
        return response


def add_page(app: FastAPI) -> None:
    """Serve the page at `/` and its parts under `/web/`."""
    files = PageFiles()
    app.mount("/web", files)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)
