"""The page's files: plain HTML, CSS and ES modules out of `web/`, with headers that keep everything else out."""

from __future__ import annotations

import mimetypes
from importlib.resources import files

from fastapi import FastAPI
from fastapi.responses import Response
from starlette.exceptions import HTTPException

# Nothing from elsewhere, nothing inline; pictures that the page itself made are blobs. `connect-src 'self'` is the
# socket.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # after an upgrade old modules must not meet new ones
}


def add_page(app: FastAPI) -> None:
    """Serve the page at `/` and its parts under `/web/`."""
    parts = _parts()

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return parts["index.html"]

    @app.get("/web/{name:path}", include_in_schema=False)
    async def part(name: str) -> Response:
        if name not in parts:
            raise HTTPException(404, f"the page has no part {name[:80]!r}")
        return parts[name]


def _parts() -> dict[str, Response]:
    """Every file of `web/` by its path there, ready to send. A name that is not listed here cannot be asked for."""
    root = files("sana_sprint.serve") / "web"
    found = {}
    folders = [("", root)]
    while folders:
        prefix, folder = folders.pop()
        for entry in folder.iterdir():
            if entry.is_dir():
                folders.append((f"{prefix}{entry.name}/", entry))
            else:
                found[prefix + entry.name] = Response(
                    entry.read_bytes(), media_type=_media_type(entry.name), headers=HEADERS
                )
    return found


def _media_type(name: str) -> str:
    # Not left to the machine's tables, some of which call scripts plain text, which browsers then do not run.
    known = {"js": "text/javascript", "css": "text/css", "html": "text/html", "svg": "image/svg+xml"}
    return known.get(name.rpartition(".")[2]) or mimetypes.guess_type(name)[0] or "application/octet-stream"
