"""The HTTP server, asked as programs ask it: through OpenAI's own client and plain requests to a real server."""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from PIL import Image

from sana_sprint.images import read_settings
from sana_sprint.serve.engine import Engine, Pipelines
from sana_sprint.serve.service import JOB_BYTES
from sana_sprint.serve.settings import Settings, check_bind
from tests.helpers.serve import WAIT_S, assert_close, emoji, running_engine, running_server, watched_network

KEY = "a-key-for-tests"
LIMITS = Settings(
    max_pixels=128 * 128,
    max_n=3,
    max_steps=4,
    max_prompt_chars=40,
    max_body_bytes=20_000,
    max_upload_pixels=900,
)


def sketch(width: int = 20, height: int = 30, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(file, kind)
    return file.getvalue()


def claiming(width: int, height: int) -> bytes:
    """A small PNG file whose header claims this size."""
    data = bytearray(sketch())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def picture_of(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data)))


def draw_with_control(
    *, image: Any, kind: str, controlnet_conditioning_scale: float, **arguments: Any
) -> Any:
    assert (len(image), kind, controlnet_conditioning_scale) == (1, "canny", 0.5)
    return emoji()(**arguments)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with running_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    with running_server(engine, LIMITS) as url:
        yield url


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=url, timeout=WAIT_S) as client:
        yield client


def error_of(response: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    """The error object of a response, which must have this status and code."""
    assert response.status_code == status, response.text
    content = response.json()
    assert set(content) == {"error"}
    assert set(content["error"]) == {"message", "type", "param", "code"}
    assert content["error"]["code"] == code
    return dict(content["error"])


# ----- OpenAI's client ------------------------------------------------------------------------------------------------


def test_the_openai_client_draws(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=WAIT_S) as client:
        answer = client.images.generate(
            prompt="a cat", n=2, size="128x128", extra_body={"seed": 5, "steps": 1}
        )
        pictures = [picture_of(datum.b64_json or "") for datum in answer.data or []]
        expected = emoji()("a cat", 1, seed=5, num_images_per_prompt=2).images
        for found, picture in zip(pictures, expected, strict=True):
            assert_close(found, picture)
        settings = read_settings(pictures[1])
        assert settings is not None
        wanted = {"prompt": "a cat", "seed": 6, "num_inference_steps": 1, "width": 128, "model": "emoji"}
        assert {**settings, **wanted} == settings
        assert answer.size == "128x128"
        assert [model.id for model in client.models.list()] == ["emoji"]
        assert client.models.retrieve("emoji").id == "emoji"
        with pytest.raises(openai.NotFoundError, match="no model"):
            client.images.generate(prompt="a cat", model="another")
        with pytest.raises(openai.BadRequestError, match="no ControlNet"):
            client.images.edit(prompt="a cat", image=sketch())


def test_the_openai_client_edits_with_a_sketch() -> None:
    pipelines = Pipelines(emoji(), draw_with_control)
    with (
        running_engine(lambda: pipelines) as engine,
        running_server(engine) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=WAIT_S) as client,
    ):
        extra = {"seed": 5, "steps": 1, "control_kind": "canny", "control_scale": 0.5}
        answer = client.images.edit(prompt="a cat", image=sketch(), extra_body=extra)
        assert_close(picture_of((answer.data or [])[0].b64_json or ""), emoji()("a cat", 1, seed=5).images[0])
        again = client.images.edit(prompt="a cat", image=[sketch()], extra_body=extra)  # sent as image[]
        assert (again.data or [])[0].b64_json == (answer.data or [])[0].b64_json
        for number in ({"n": 10**12, "seed": 1}, {"steps": 10**12}):
            with pytest.raises(openai.BadRequestError, match=f"{next(iter(number))} may be at most"):
                client.images.edit(prompt="a cat", image=b"not a picture", extra_body=number)
        with pytest.raises(openai.BadRequestError, match="mask"):
            client.images.edit(prompt="a cat", image=sketch(), mask=sketch())


@pytest.mark.parametrize(("output_format", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats_and_data_urls(http: httpx2.Client, output_format: str, kind: str) -> None:
    body = {"prompt": "a cat", "steps": 1, "output_format": output_format, "response_format": "url"}
    answer = http.post("/v1/images/generations", json=body).json()
    prefix, _, data = answer["data"][0]["url"].partition(",")
    assert prefix == f"data:image/{output_format};base64"
    assert picture_of(data).format == kind
    again = http.post("/v1/images/generations", json={**body, "seed": answer["data"][0]["seed"]}).json()
    assert again["data"] == answer["data"]  # the seed that was drawn is told, and makes the same picture
    assert answer["timings"].keys() == {"queue", "text", "steps", "decode"}
    assert answer["untaught_words"] == []


def test_words_that_the_model_was_not_taught_are_named(http: httpx2.Client) -> None:
    body = {"prompt": "a cat riding a bicycle, oil", "steps": 1}
    answer = http.post("/v1/images/generations", json=body).json()
    assert answer["untaught_words"] == ["riding", "oil"]


# ----- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"prompt": " \n"}, 400, "empty_prompt"),
        ({"prompt": "a" * 41}, 400, "over_limit"),
        ({"n": 4}, 400, "over_limit"),
        ({"n": 10**12, "seed": 1}, 400, "over_limit"),  # no list of that length is made
        ({"steps": 5}, 400, "over_limit"),
        ({"size": "129x128"}, 400, "over_limit"),
        ({"seed": 2**64 - 1}, 422, "invalid_value"),
        ({"output_compression": 50}, 400, "invalid_value"),
        ({"prompt": None}, 422, "invalid_value"),
        ({"n": 0}, 422, "invalid_value"),
        ({"n": "many"}, 422, "invalid_value"),
        ({"steps": 0}, 422, "invalid_value"),
        ({"size": "128"}, 422, "invalid_value"),
        ({"size": "0x128"}, 422, "invalid_value"),
        ({"guidance_scale": -1}, 422, "invalid_value"),
        ({"seed": -2}, 422, "invalid_value"),
        ({"output_format": "gif"}, 422, "invalid_value"),
        ({"background": "transparent"}, 422, "invalid_value"),
        ({"stream": True}, 422, "invalid_value"),
        ({"negative_prompt": "blurry"}, 422, "invalid_value"),
        ({"strength": 0.5}, 422, "unknown_parameter"),
    ],
)
def test_bad_values_are_refused_by_name(
    http: httpx2.Client, change: dict[str, Any], status: int, code: str
) -> None:
    error = error_of(http.post("/v1/images/generations", json={"prompt": "a cat", **change}), status, code)
    assert error["param"] in change
    assert error["type"] == "invalid_request_error"


def test_names_that_cannot_be_written_are_refused_too(http: httpx2.Client) -> None:
    as_json = {"content-type": "application/json"}
    for body in (rb'{"prompt": "a cat", "\ud800": 1}', rb'{"prompt": "\ud800"}'):
        answer = http.post("/v1/images/generations", content=body, headers=as_json)
        error_of(answer, 422, "invalid_value")
    long = http.post("/v1/images/generations", json={"prompt": "a cat", "x" * 10_000: 1})
    assert len(long.content) < 500


def test_harmless_fields_of_openai_are_accepted(http: httpx2.Client) -> None:
    harmless = {"user": "me", "quality": "high", "style": "vivid", "moderation": "low", "background": "auto"}
    body = {"prompt": "a cat", "model": "emoji", "seed": -1, "steps": 1, "stream": False, **harmless}
    assert http.post("/v1/images/generations", json=body).status_code == 200


def test_errors_of_the_protocol_are_error_objects(http: httpx2.Client) -> None:
    path, as_json = "/v1/images/generations", {"content-type": "application/json"}
    error_of(http.get("/v1/nothing"), 404, "not_found")
    assert "POST" in http.get(path).headers["allow"]
    error_of(http.get(path), 405, "method_not_allowed")
    error_of(http.post(path, content="{", headers=as_json), 400, "invalid_json")
    error_of(http.post(path, content="[]", headers=as_json), 422, "invalid_value")
    error_of(http.post(path, json={"prompt": "a" * 30_000}), 413, "too_large")

    def unannounced() -> Iterator[bytes]:
        for _ in range(30):
            yield b" " * 1000

    error_of(http.post(path, content=unannounced(), headers=as_json), 413, "too_large")


def test_every_answer_has_an_id_that_a_proxy_may_choose(http: httpx2.Client) -> None:
    ids = [http.get("/health").headers["x-request-id"] for _ in range(2)]
    assert [len(one) for one in ids] == [16, 16]
    assert ids[0] != ids[1]
    assert http.get("/health", headers={"x-request-id": "from-a.proxy_1"}).headers["x-request-id"] == (
        "from-a.proxy_1"
    )
    for unsafe in ("a b", "x" * 65, "\x1b[31m"):  # ids go into logs
        assert len(http.get("/health", headers={"x-request-id": unsafe}).headers["x-request-id"]) == 16
    refused = http.get("/v1/models", headers={"origin": "http://example.com", "x-request-id": "7"})
    assert (refused.status_code, refused.headers["x-request-id"]) == (403, "7")


def test_answers_are_not_stored_or_taken_for_other_types(http: httpx2.Client) -> None:
    for path in ("/health", "/v1/models", "/v1/nothing", "/"):
        assert http.get(path).headers["x-content-type-options"] == "nosniff"
    for path in ("/v1/models", "/v1/nothing", "/metrics"):
        assert http.get(path).headers["cache-control"] == "no-store"


def test_monitors_may_ask_for_the_headers_alone(http: httpx2.Client) -> None:
    for path in ("/health", "/ready", "/", "/web/main.js"):
        answer = http.head(path)
        assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize("field", [{"n": 10**12, "seed": 1}, {"steps": 10**12}, {"n": 10**4000}])
def test_numbers_are_checked_before_anything_of_their_size_is_made(
    http: httpx2.Client, field: dict[str, int]
) -> None:
    name = next(iter(field))
    for path in ("/v1/images/generations", "/v1/jobs"):
        error = error_of(http.post(path, json={"prompt": "a cat", **field}), 400, "over_limit")
        assert error["param"] == name
        assert len(error["message"]) < 200
    # Before a picture is decoded too: this one would be refused.
    body = {"prompt": "a cat", "image": base64.b64encode(b"not a picture").decode(), **field}
    error_of(http.post("/v1/jobs", json=body), 400, "over_limit")


def test_pages_of_other_origins_and_names_are_refused(http: httpx2.Client) -> None:
    error_of(http.get("/v1/models", headers={"origin": "http://example.com"}), 403, "wrong_origin")
    error_of(http.get("/v1/models", headers={"host": "example.com"}), 403, "wrong_host")
    for malformed in ("[", "[::1", "", "localhost@example.com"):
        error_of(http.get("/v1/models", headers={"host": malformed}), 403, "wrong_host")
    for malformed in ("http://[", "null", ""):
        error_of(http.get("/v1/models", headers={"origin": malformed}), 403, "wrong_origin")
    own = http.get("/v1/models", headers={"origin": str(http.base_url).rstrip("/")})
    assert own.status_code == 200
    assert "access-control-allow-origin" not in own.headers


@pytest.mark.parametrize(
    ("image", "status", "code"),
    [
        ("http://127.0.0.1/secret.png", 400, "no_fetching"),
        ("not base64!", 400, "invalid_image"),
        (base64.b64encode(b"not a picture").decode(), 400, "invalid_image"),
        (base64.b64encode(sketch()[:60]).decode(), 400, "invalid_image"),
        (base64.b64encode(sketch(kind="GIF")).decode(), 400, "invalid_image"),
        (base64.b64encode(sketch(31, 30)).decode(), 413, "too_large"),
        (base64.b64encode(claiming(20_000, 20_000)).decode(), 413, "too_large"),
        (
            "data:image/png;base64," + base64.b64encode(sketch()).decode(),
            400,
            "invalid_value",
        ),  # no ControlNet
    ],
)
def test_images_are_decoded_within_limits(http: httpx2.Client, image: str, status: int, code: str) -> None:
    error_of(http.post("/v1/jobs", json={"prompt": "a cat", "image": image}), status, code)


def test_a_key_is_asked_for_and_a_public_address_needs_one() -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.com"):
        with pytest.raises(ValueError, match="needs an API key"):
            check_bind(host, None)
        check_bind(host, KEY)
    for host in ("127.0.0.1", "localhost", "::1"):
        check_bind(host, None)
    with (
        running_engine() as engine,
        running_server(engine, Settings(api_key=KEY)) as url,
        httpx2.Client(base_url=url, timeout=WAIT_S) as http,
    ):
        for headers in ({}, {"authorization": "Bearer another"}, {"authorization": KEY}):
            error = error_of(http.get("/v1/models", headers=headers), 401, "invalid_api_key")
            assert error["type"] == "authentication_error"
        assert http.get("/v1/models").headers["www-authenticate"] == "Bearer"
        with socket.create_connection((http.base_url.host, http.base_url.port), timeout=WAIT_S) as connection:
            head = (
                "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"
            )
            connection.sendall(head.encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 401")  # before its body has come
        error_of(http.get("/metrics"), 401, "invalid_api_key")
        assert http.get("/v1/models", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
        assert [http.get(path).status_code for path in ("/health", "/ready")] == [200, 200]


# ----- under load -----------------------------------------------------------------------------------------------------


def test_a_busy_server_refuses_and_stays_healthy() -> None:
    with (
        watched_network() as network,
        running_engine(max_queue=1) as engine,
        running_server(engine) as url,
        httpx2.Client(base_url=url, timeout=WAIT_S) as http,
    ):
        network.hold()
        jobs = [http.post("/v1/jobs", json={"prompt": "a cat", "steps": 1}).json()]
        network.wait_until_entered()
        jobs.append(http.post("/v1/jobs", json={"prompt": "a cat", "steps": 1}).json())
        refusal = http.post("/v1/images/generations", json={"prompt": "a cat"})
        assert error_of(refusal, 429, "queue_full")["type"] == "rate_limit_error"
        assert int(refusal.headers["retry-after"]) >= 1
        assert http.get("/health").json()["status"] == "ok"  # though the engine stands still
        assert http.get("/ready").status_code == 200
        metrics = http.get("/metrics").text
        assert "sana_sprint_queue_depth 1.0" in metrics
        assert 'sana_sprint_refused_total{code="queue_full"} 1.0' in metrics
        network.go_on()
        for job in jobs:
            assert "event: done" in http.get(f"/v1/jobs/{job['id']}/events").text
        engine.close()  # when its thread has ended, all has been counted
        assert http.get("/ready").status_code == 503
        metrics = http.get("/metrics").text
        assert "sana_sprint_batch_pictures_count 2.0" in metrics
        assert 'sana_sprint_stage_seconds_count{stage="decode"} 2.0' in metrics
        assert 'sana_sprint_jobs_total{status="done"} 2.0' in metrics


def test_a_client_that_hangs_up_frees_the_engine() -> None:
    cancelled = threading.Event()
    with (
        watched_network() as network,
        running_engine() as engine,
        running_server(engine) as url,
        httpx2.Client(base_url=url, timeout=WAIT_S) as http,
    ):
        submit = engine.submit

        def watching(request: Any) -> Any:
            job = submit(request)
            job.subscribe(lambda job: cancelled.set() if job.status == "cancelled" else None)
            return job

        engine.submit = watching  # type: ignore[method-assign]
        network.hold()
        with pytest.raises(httpx2.ReadTimeout):
            http.post("/v1/images/generations", json={"prompt": "a cat", "steps": 4}, timeout=0.5)
        network.wait_until_entered()
        assert cancelled.wait(WAIT_S)
        network.go_on()
        assert http.post("/v1/images/generations", json={"prompt": "a cat", "steps": 1}).status_code == 200
        assert len(network.batches) == 2  # one of the four steps, then the next request


# ----- jobs -----------------------------------------------------------------------------------------------------------


def test_a_job_is_watched_and_fetched(http: httpx2.Client) -> None:
    body = {"prompt": "a cat", "steps": 2, "seed": 4, "output_format": "png"}
    submitted = http.post("/v1/jobs", json=body)
    assert submitted.status_code == 202
    path = f"/v1/jobs/{submitted.json()['id']}"
    events = http.get(f"{path}/events")
    assert events.headers["content-type"].startswith("text/event-stream")
    states = [
        json.loads(line.removeprefix("data: ")) for line in events.text.splitlines() if "data: " in line
    ]
    assert states[-1]["status"] == "done"
    done = [state["progress"]["done"] for state in states]
    assert done == sorted(done)
    assert http.get(path).json() == states[-1]
    answer = http.get(f"{path}/result").json()
    assert_close(picture_of(answer["data"][0]["b64_json"]), emoji()("a cat", 2, seed=4).images[0])
    assert http.delete(path).json()["status"] == "done"


def test_a_job_is_cancelled(http: httpx2.Client) -> None:
    with watched_network() as network:
        network.hold()
        path = f"/v1/jobs/{http.post('/v1/jobs', json={'prompt': 'a cat', 'steps': 3}).json()['id']}"
        network.wait_until_entered()
        error_of(http.get(f"{path}/result"), 409, "not_done")
        assert http.delete(path).json()["status"] == "cancelled"
        network.go_on()
        assert "event: cancelled" in http.get(f"{path}/events").text
        error_of(http.get(f"{path}/result"), 410, "cancelled")
        http.post(
            "/v1/images/generations", json={"prompt": "a cat", "steps": 1}
        )  # by then the engine has let go
        assert network.batches == [1, 1]
    error_of(http.get("/v1/jobs/unknown"), 404, "job_not_found")


def test_a_failed_job_says_why(http: httpx2.Client) -> None:
    with watched_network(lambda output, guidance: output.fill_(np.nan)):
        job = http.post("/v1/jobs", json={"prompt": "a cat", "steps": 1}).json()
        assert "event: failed" in http.get(f"/v1/jobs/{job['id']}/events").text
    assert http.get(f"/v1/jobs/{job['id']}").json()["error"]["code"] == "non_finite"
    error_of(http.get(f"/v1/jobs/{job['id']}/result"), 500, "non_finite")


def test_old_jobs_are_dropped() -> None:
    with (
        running_engine() as engine,
        running_server(engine, Settings(max_kept_bytes=2 * (128 * 128 * 3 + JOB_BYTES))) as url,
        httpx2.Client(base_url=url, timeout=WAIT_S) as http,
    ):
        paths = []
        for _ in range(3):
            paths.append(f"/v1/jobs/{http.post('/v1/jobs', json={'prompt': 'a', 'steps': 1}).json()['id']}")
            http.get(f"{paths[-1]}/events")
        assert [http.get(path).status_code for path in paths] == [404, 200, 200]


def test_the_api_describes_itself(http: httpx2.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    assert {"/v1/images/generations", "/v1/images/edits", "/v1/models", "/v1/jobs", "/health"} <= set(paths)
    form = paths["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert {"image", "prompt", "seed", "control_kind"} <= set(form["properties"])
    assert http.get("/docs").status_code == 404  # that page would load scripts from elsewhere
