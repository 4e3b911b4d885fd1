"""The real-time page and its socket: the page sends a request whenever its input changes, and gets each picture when it is
drawn.

A page has one slot: at most one of its requests is in the engine, at most one waits, and a newer one replaces the
waiting one. Every message, both ways, is one binary frame: the header's length (4 bytes, big-endian), the
header (a JSON object in UTF-8), and the bytes of a picture or nothing. docs/serving.md lists the headers.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from pydantic import ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from sana_sprint.controls import BUILT_IN
from sana_sprint.images import INFOTEXT_KEY, SETTINGS_KEY, infotext
from sana_sprint.serve.engine import Engine, ImageRequest, Job, Result
from sana_sprint.serve.engine.batch import ModelFacts
from sana_sprint.serve.errors import ApiError, as_api_error
from sana_sprint.serve.images import decode_upload, encode, settings_of
from sana_sprint.serve.routes.page import add_page
from sana_sprint.serve.schema import Control, Generation
from sana_sprint.serve.security import is_key
from sana_sprint.serve.settings import Settings

__all__ = ["PATH", "PROTOCOL", "add_realtime", "pack", "unpack"]

PATH = "/realtime"
PROTOCOL = 1
LENGTH_BYTES = 4
MAX_SEQUENCE = 2**53 - 1  # JavaScript's largest whole number
HELLO_TIMEOUT_S = 10.0
LOADING_POLL_S = 0.1

# Close codes: 4000 to 4999 are an application's own.
BAD_KEY, BAD_MESSAGE, TOO_LARGE, TRY_LATER = 4401, 1003, 1009, 1013


def add_realtime(app: FastAPI, engine: Engine, settings: Settings) -> None:
    """Serve the page at `/` and its socket at `/realtime`. The app's guard has checked host and origin."""
    add_page(app)

    @app.websocket(PATH)
    async def realtime(socket: WebSocket) -> None:
        await socket.accept()
        try:
            await _serve(_Frames(socket, settings.max_body_bytes), engine, settings)
        except _Close as close:
            await socket.close(close.code, close.reason)
        except WebSocketDisconnect:
            pass


# ----- frames ---------------------------------------------------------------------------------------------------------


def pack(header: dict[str, Any], body: bytes = b"") -> bytes:
    """A header and the bytes of a picture as one message."""
    text = json.dumps(header, ensure_ascii=False).encode()
    return len(text).to_bytes(LENGTH_BYTES, "big") + text + body


def unpack(frame: bytes) -> tuple[dict[str, Any], bytes]:
    """The header, and the bytes behind it.

    Raises:
        ValueError: if the frame has another form.
    """
    end = LENGTH_BYTES + int.from_bytes(frame[:LENGTH_BYTES], "big")
    if len(frame) < max(end, LENGTH_BYTES):
        raise ValueError("the frame is shorter than its header")
    header = json.loads(frame[LENGTH_BYTES:end])
    if not isinstance(header, dict):
        raise ValueError(f"a header must be a JSON object, got: {type(header).__name__}")
    return header, frame[end:]


class _Close(Exception):  # noqa: N818
    """Closes the socket; the reason fits into a close frame (123 bytes)."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class _Frames:
    """Frames over a WebSocket."""

    def __init__(self, socket: WebSocket, max_bytes: int) -> None:
        self._socket = socket
        self._max_bytes = max_bytes

    async def send(self, header: dict[str, Any], body: bytes = b"") -> None:
        await self._socket.send_bytes(pack(header, body))

    async def receive(self) -> tuple[dict[str, Any], bytes]:
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        data = message.get("bytes")
        if data is None:
            raise _Close(BAD_MESSAGE, "only binary frames are understood")
        if len(data) > self._max_bytes:
            raise _Close(TOO_LARGE, f"a message may have {self._max_bytes} bytes")
        try:
            return unpack(data)
        except (ValueError, RecursionError) as error:
            raise _Close(BAD_MESSAGE, "not a frame") from error


# ----- the protocol ---------------------------------------------------------------------------------------------------


class _Draw(Generation, Control):
    """Header of a drawing: the fields of `/v1/images/edits`, and the page's number for it. The body is the sketch."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["draw"]
    sequence: int = Field(ge=0, le=MAX_SEQUENCE)
    n: Literal[1] | None = None


@dataclass(frozen=True)
class _Wanted:
    """A request that waits in the slot."""

    sequence: int
    output_format: str
    request: ImageRequest


async def _serve(frames: _Frames, engine: Engine, settings: Settings) -> None:
    await _greet(frames, settings)
    await frames.send(_welcome(await _facts(frames, engine), settings))
    page = _Page(frames, engine, settings)
    drawer = asyncio.create_task(page.draw())
    try:
        await page.listen()
    finally:
        drawer.cancel()
        await asyncio.gather(drawer, return_exceptions=True)  # its job is cancelled before the socket closes


async def _greet(frames: _Frames, settings: Settings) -> None:
    """The first message must be a hello of this protocol, with the key if there is one."""
    try:
        header, _ = await asyncio.wait_for(frames.receive(), HELLO_TIMEOUT_S)
    except TimeoutError:
        raise _Close(BAD_MESSAGE, "no hello came") from None
    if header.get("type") != "hello" or header.get("protocol") != PROTOCOL:
        raise _Close(
            BAD_MESSAGE, f"the first message must be a hello of protocol {PROTOCOL}; reload the page"
        )
    key = header.get("key")
    if not is_key(key if isinstance(key, str) else "", settings):
        raise _Close(BAD_KEY, "a valid API key is needed")


async def _facts(frames: _Frames, engine: Engine) -> ModelFacts:
    """The model's facts, after the first load."""
    if engine.facts is None:
        await frames.send({"type": "loading"})
    while engine.facts is None:
        if engine.state != "loading":
            raise _Close(TRY_LATER, "the model could not be loaded; the server's log says why")
        await asyncio.sleep(LOADING_POLL_S)
    return engine.facts


def _welcome(facts: ModelFacts, settings: Settings) -> dict[str, Any]:
    return {
        "type": "welcome",
        "model": settings.model,
        "native": facts.native,
        "max_pixels": settings.max_pixels,
        "max_steps": settings.max_steps,
        "has_guidance": facts.has_guidance,
        "control_kinds": list(BUILT_IN) if facts.has_control else [],
        "control_labels": BUILT_IN if facts.has_control else {},
    }


class _Page:
    """The slot of one page: `listen` fills it, `draw` empties it."""

    def __init__(self, frames: _Frames, engine: Engine, settings: Settings) -> None:
        self._frames = frames
        self._engine = engine
        self._settings = settings
        self._waiting: _Wanted | None = None
        self._filled = asyncio.Event()
        self._running: tuple[int, Job] | None = None  # its sequence number too

    async def listen(self) -> None:
        """Handle the page's messages until it disconnects."""
        while True:
            header, body = await self._frames.receive()
            match header.get("type"):
                case "draw":
                    await self._put(header, body)
                case "cancel":
                    await self._cancel(header.get("sequence"))
                case other:
                    raise _Close(BAD_MESSAGE, f"there is no message {str(other)[:40]!r}")

    async def draw(self) -> None:
        """Draw the slot's requests, one after the other."""
        while True:
            await self._filled.wait()
            self._filled.clear()
            if (wanted := self._waiting) is not None:
                self._waiting = None
                await self._frames.send(*await self._answer(wanted))

    async def _put(self, header: dict[str, Any], body: bytes) -> None:
        try:
            fields = _Draw.model_validate(header)
            fields.check(self._settings)
            image = await self._decode(body)
            request = fields.request(self._settings, **fields.with_image(image))
        except Exception as error:
            await self._frames.send(_error(_sequence(header), error))
            return
        if self._waiting is not None:
            await self._drop(self._waiting.sequence)
        self._waiting = _Wanted(fields.sequence, fields.output_format or "png", request)
        self._filled.set()

    async def _decode(self, body: bytes) -> np.ndarray | None:
        if not body:
            return None
        return await run_in_threadpool(decode_upload, body, self._settings.max_upload_pixels)

    async def _cancel(self, sequence: object) -> None:
        if self._running is not None and self._running[0] == sequence:
            self._running[1].cancel()  # `draw` answers
        elif self._waiting is not None and self._waiting.sequence == sequence:
            self._waiting = None
            await self._drop(sequence)

    async def _drop(self, sequence: object) -> None:
        await self._frames.send({"type": "dropped", "sequence": sequence})

    async def _answer(self, wanted: _Wanted) -> tuple[dict[str, Any], bytes]:
        """The frame for a request: a picture, an error, or that it was cancelled."""
        try:
            job = self._engine.submit(wanted.request)
            self._running = (wanted.sequence, job)
            drawn = asyncio.wrap_future(job.future)
            try:
                await asyncio.wait([drawn])
            finally:
                self._running = None
                job.cancel()  # without effect if it has ended; else the page has disconnected
            if drawn.cancelled():
                return {"type": "dropped", "sequence": wanted.sequence}, b""
            result = drawn.result()
            return await run_in_threadpool(_picture, wanted, job, result, self._settings.model)
        except Exception as error:
            return _error(wanted.sequence, error), b""


def _picture(wanted: _Wanted, job: Job, result: Result, model: str) -> tuple[dict[str, Any], bytes]:
    settings = settings_of(job, result, 0, model)
    texts = {SETTINGS_KEY: json.dumps(settings, ensure_ascii=False), INFOTEXT_KEY: infotext(settings)}
    header = {
        "type": "picture",
        "sequence": wanted.sequence,
        "format": wanted.output_format,
        "texts": texts,
        "lost_prompt_tokens": result.lost_tokens,
        "untaught_words": list(result.untaught_words),
        "timings": {stage: round(seconds, 4) for stage, seconds in result.timings.items()},
    }
    return header, encode(result.images[0], wanted.output_format, None, settings)


def _sequence(header: dict[str, Any]) -> int | None:
    """The number of a drawing that is refused, if it is one: nothing else is sent back."""
    number = header.get("sequence")
    return number if type(number) is int and 0 <= number <= MAX_SEQUENCE else None


def _error(sequence: int | None, error: Exception) -> dict[str, Any]:
    """The same error object as HTTP's, and when to come back, in seconds."""
    found: ApiError = as_api_error(error)
    after = found.headers.get("Retry-After")
    return {
        "type": "error",
        "sequence": sequence,
        **found.content,
        "retry_after": None if after is None else int(after),
    }
