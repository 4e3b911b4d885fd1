"""The real-time socket without a browser: frames, one slot, latest wins, and what is refused."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from sana_sprint.images import read_settings
from sana_sprint.serve.routes.realtime import BAD_KEY, BAD_MESSAGE, PROTOCOL, TOO_LARGE, pack, unpack
from sana_sprint.serve.settings import Settings
from tests.helpers.page import WAIT_S, FakeEngine, color_of, page_server

HELLO = {"type": "hello", "protocol": PROTOCOL}


@contextmanager
def socket_to(
    engine: FakeEngine, settings: Settings | None = None, **options: Any
) -> Iterator[ClientConnection]:
    with page_server(engine, settings) as address:
        url = address.replace("http", "ws") + "realtime"
        with connect(url, proxy=None, close_timeout=1, **options) as socket:
            yield socket


def ask(socket: ClientConnection, header: dict[str, Any], body: bytes = b"") -> tuple[dict[str, Any], bytes]:
    socket.send(pack(header, body))
    return unpack(socket.recv(timeout=WAIT_S))


def draw(sequence: int, prompt: str = "a cat", **fields: Any) -> dict[str, Any]:
    return {"type": "draw", "sequence": sequence, "prompt": prompt, "seed": 7, "steps": 2, **fields}


def close_code(socket: ClientConnection) -> int:
    with pytest.raises(ConnectionClosed) as caught:
        socket.recv(timeout=WAIT_S)
    assert caught.value.rcvd is not None
    return caught.value.rcvd.code


def png(width: int = 16, height: int = 16, color: str = "white") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), color).save(file, "PNG")
    return file.getvalue()


def test_frames_come_back_as_they_were() -> None:
    header = {"type": "draw", "prompt": "ein Apfel, größer 🍎"}
    assert unpack(pack(header, b"\0picture")) == (header, b"\0picture")


@pytest.mark.parametrize("frame", [b"", b"\0\0", b"\0\0\0\x09{}", b"\0\0\0\x02[]", b"\xff\xff\xff\xff{}"])
def test_what_is_no_frame_is_refused(frame: bytes) -> None:
    with pytest.raises(ValueError, match=r"shorter|must be|Expecting"):
        unpack(frame)


def test_a_picture_comes_back_with_its_number_and_its_settings() -> None:
    engine = FakeEngine()
    with socket_to(engine) as socket:
        welcome, _ = ask(socket, HELLO)
        assert welcome == {
            "type": "welcome",
            "model": "emoji",
            "native": 128,
            "max_pixels": Settings().max_pixels,
            "max_steps": Settings().max_steps,
            "has_guidance": True,
            "control_kinds": [],
            "control_labels": {},
        }
        header, body = ask(socket, draw(5, size="64x48"))
    picture = Image.open(io.BytesIO(body))
    settings = read_settings(picture)
    assert (header["type"], header["sequence"], header["format"]) == ("picture", 5, "png")
    assert (picture.size, picture.getpixel((0, 0))) == ((64, 48), color_of(engine.requests[0]))
    assert settings is not None
    assert json.loads(header["texts"]["sana_sprint"]) == settings
    assert settings["prompt"] == "a cat"
    assert header["untaught_words"] == []


def test_a_sketch_reaches_the_engine() -> None:
    engine = FakeEngine(has_control=True)
    with socket_to(engine) as socket:
        welcome, _ = ask(socket, HELLO)
        assert welcome["control_kinds"] == ["scribble", "canny", "softedge"]
        assert welcome["control_labels"]["scribble"] == "Drawn lines"
        header, _ = ask(socket, draw(1, control_kind="scribble", control_scale=0.5), png(color="red"))
    assert header["type"] == "picture"
    image = engine.requests[0].image
    assert image is not None
    assert image.shape == (16, 16, 3)
    assert (image == (255, 0, 0)).all()
    assert engine.requests[0].control_scale == 0.5


def test_of_those_that_wait_only_the_newest_is_drawn() -> None:
    engine = FakeEngine()
    engine.hold()
    with socket_to(engine) as socket:
        ask(socket, HELLO)
        socket.send(pack(draw(1, "first")))
        engine.wait_for_job()
        for number in (2, 3, 4):
            socket.send(pack(draw(number)))
        dropped = [unpack(socket.recv(timeout=WAIT_S))[0] for _ in range(2)]
        engine.go_on()
        drawn = [unpack(socket.recv(timeout=WAIT_S))[0] for _ in range(2)]
    assert [(one["type"], one["sequence"]) for one in dropped] == [("dropped", 2), ("dropped", 3)]
    assert [(one["type"], one["sequence"]) for one in drawn] == [("picture", 1), ("picture", 4)]
    assert engine.most == 1


def test_a_cancelled_drawing_stops_and_the_next_goes_on() -> None:
    engine = FakeEngine()
    engine.hold()
    with socket_to(engine) as socket:
        ask(socket, HELLO)
        socket.send(pack(draw(1)))
        engine.wait_for_job()
        assert ask(socket, {"type": "cancel", "sequence": 1})[0] == {"type": "dropped", "sequence": 1}
        assert engine.jobs[0].status == "cancelled"
        engine.go_on()
        assert ask(socket, draw(2))[0]["type"] == "picture"


def test_a_page_that_goes_takes_its_job_along() -> None:
    engine = FakeEngine()
    engine.hold()
    with socket_to(engine) as socket:
        ask(socket, HELLO)
        socket.send(pack(draw(1)))
        engine.wait_for_job()
        ended = threading.Event()
        engine.jobs[0].future.add_done_callback(lambda _: ended.set())
        socket.close()
        assert ended.wait(WAIT_S)
    assert engine.jobs[0].status == "cancelled"


def test_a_full_queue_says_when_to_come_back() -> None:
    engine = FakeEngine()
    engine.refusals = 1
    with socket_to(engine) as socket:
        ask(socket, HELLO)
        header, _ = ask(socket, draw(1))
        assert (header["type"], header["sequence"], header["retry_after"]) == ("error", 1, 1)
        assert header["error"]["code"] == "queue_full"
        assert ask(socket, draw(2))[0]["type"] == "picture"


@pytest.mark.parametrize(
    ("fields", "body", "code"),
    [
        ({"prompt": "  "}, b"", "empty_prompt"),
        ({"steps": 21}, b"", "over_limit"),
        ({"size": "9000x9000"}, b"", "over_limit"),
        ({"steps": 10**12}, b"GIF89a", "over_limit"),
        ({"n": 2}, b"", "invalid_value"),
        ({"n": 10**12, "seed": 1}, b"", "invalid_value"),
        ({"colour": "red"}, b"", "unknown_parameter"),
        ({}, b"GIF89a", "invalid_image"),
        ({}, png(5000, 5000), "too_large"),
        ({}, png(), "invalid_value"),  # this model has no ControlNet
    ],
)
def test_what_cannot_be_drawn_is_said_and_the_socket_stays(
    fields: dict[str, Any], body: bytes, code: str
) -> None:
    with socket_to(FakeEngine()) as socket:
        ask(socket, HELLO)
        header, _ = ask(socket, {**draw(3), **fields}, body)
        assert (header["type"], header["sequence"], header["error"]["code"]) == ("error", 3, code)
        assert header["retry_after"] is None
        assert ask(socket, draw(4))[0]["type"] == "picture"


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("text", BAD_MESSAGE),
        (b"\0", BAD_MESSAGE),
        (pack({"type": "paint"}), BAD_MESSAGE),
        (pack({"type": "cancel"}, bytes(3000)), TOO_LARGE),
    ],
)
def test_who_does_not_speak_the_protocol_is_shown_out(message: str | bytes, code: int) -> None:
    with socket_to(FakeEngine(), Settings(max_body_bytes=2000)) as socket:
        ask(socket, HELLO)
        socket.send(message)
        assert close_code(socket) == code


@pytest.mark.parametrize("hello", [{**HELLO, "protocol": PROTOCOL + 1}, draw(1)])
def test_the_first_message_is_a_hello(hello: dict[str, Any]) -> None:
    with socket_to(FakeEngine()) as socket:
        socket.send(pack(hello))
        assert close_code(socket) == BAD_MESSAGE


@pytest.mark.parametrize("key", [None, "wrong", 5, "\ud800"])
def test_nobody_comes_in_without_the_key(key: object) -> None:
    with socket_to(FakeEngine(), Settings(api_key="secret")) as socket:
        text = json.dumps({**HELLO, "key": key}).encode()
        socket.send(len(text).to_bytes(4, "big") + text)
        assert close_code(socket) == BAD_KEY


def test_the_key_opens() -> None:
    with socket_to(FakeEngine(), Settings(api_key="secret")) as socket:
        assert ask(socket, {**HELLO, "key": "secret"})[0]["type"] == "welcome"


def test_pages_of_other_origins_are_refused() -> None:
    with pytest.raises(InvalidStatus) as caught, socket_to(FakeEngine(), origin="http://evil.example"):
        pass
    assert caught.value.response.status_code == 403


def test_a_page_waits_while_the_model_is_loaded() -> None:
    engine = FakeEngine()
    facts, engine.facts, engine.state = engine.facts, None, "loading"  # type: ignore[assignment]
    with socket_to(engine) as socket:
        assert ask(socket, HELLO)[0] == {"type": "loading"}
        engine.facts = facts
        assert unpack(socket.recv(timeout=WAIT_S))[0]["type"] == "welcome"


@pytest.mark.parametrize("sequence", ["NaN", "-1", '"x"', "[1]", "9" * 4000, r'"\ud800"'])
def test_what_is_no_sequence_number_is_not_sent_back(sequence: str) -> None:
    with socket_to(FakeEngine()) as socket:
        ask(socket, HELLO)
        text = f'{{"type": "draw", "prompt": "a cat", "sequence": {sequence}, "\\ud800": 1}}'.encode()
        socket.send(len(text).to_bytes(4, "big") + text)
        header, _ = unpack(socket.recv(timeout=WAIT_S))
        assert (header["type"], header["sequence"]) == ("error", None)
        assert ask(socket, draw(4))[0]["type"] == "picture"
