"""A browser, an engine that answers at once with pictures one can recognise, and a server for both."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image
from selenium import webdriver
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait

from sana_sprint.resolutions import Size
from sana_sprint.serve.app import create_app
from sana_sprint.serve.engine.batch import ModelFacts
from sana_sprint.serve.engine.job import Busy, ImageRequest, Job, Result
from sana_sprint.serve.settings import Settings
from sana_sprint.vocabulary import Vocabulary

WAIT_S = 60.0  # far more than anything here takes; a test that hangs is to fail

BROWSER_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # tests run as root in containers
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


# ----- the engine -----------------------------------------------------------------------------------------------------


def color_of(request: ImageRequest) -> tuple[int, int, int]:
    """The colour of the picture of a request without a sketch: another prompt, seed or step count, another colour."""
    number = zlib.crc32(f"{request.prompt}|{request.seed}|{request.steps}".encode())
    return number & 255, number >> 8 & 255, number >> 16 & 255


class FakeEngine:
    """Draws one colour per request, or the sketch itself. What it was asked for is kept.

    most: how many jobs were open at once. `hold` and `go_on` let jobs wait; `refusals` of the next requests are Busy.
    """

    state = "ready"
    queued = 0

    def __init__(self, *, has_control: bool = False, native: int = 128) -> None:
        self.facts = ModelFacts(
            native=native, has_guidance=True, has_control=has_control, dtype="float32", device="cpu"
        )
        self.on_batch: list[Any] = []
        self.on_submit: list[Any] = []
        self.requests: list[ImageRequest] = []
        self.jobs: list[Job] = []
        self.refusals = 0
        self.vocabulary: Vocabulary | None = None
        self.most = 0
        self._submitted = threading.Semaphore(0)
        self._open = 0
        self._lock = threading.Lock()
        self._may_draw = threading.Event()
        self._may_draw.set()

    def hold(self) -> None:
        """Let jobs wait from now on."""
        self._may_draw.clear()

    def go_on(self) -> None:
        """Let them go."""
        self._may_draw.set()

    def wait_for_job(self) -> None:
        """Until one more job has come."""
        assert self._submitted.acquire(timeout=WAIT_S)

    def submit(self, request: ImageRequest) -> Job:
        """As `Engine.submit`."""
        self.facts.check(request)
        if self.refusals > 0:
            self.refusals -= 1
            raise Busy(1.0)
        job = Job(request)
        with self._lock:
            self.requests.append(request)
            self.jobs.append(job)
            self._open += 1
            self.most = max(self.most, self._open)
        job.future.add_done_callback(lambda _: self._closed())
        threading.Thread(target=self._draw, args=(job,), daemon=True).start()
        self._submitted.release()
        return job

    def close(self, timeout_s: float | None = None) -> None:
        """Give up what waits."""
        for job in list(self.jobs):
            job.cancel()
        self.go_on()

    def _closed(self) -> None:
        with self._lock:
            self._open -= 1

    def _draw(self, job: Job) -> None:
        self._may_draw.wait(WAIT_S)
        request = job.request
        height, width = request.height or self.facts.native, request.width or self.facts.native
        picture = Image.new("RGB", (width, height), color_of(request))
        if request.image is not None:
            picture = Image.fromarray(np.ascontiguousarray(request.image))
        size = Size(height, width, height, width)
        untaught = self.vocabulary.untaught(request.prompt) if self.vocabulary else ()
        scale = request.guidance_scale
        job.finish(Result([picture], job.seeds, (1.5, 0.0), size, {}, scale, 0, "float32", untaught))


# ----- the server -----------------------------------------------------------------------------------------------------


@contextmanager
def page_server(engine: Any, settings: Settings | None = None, *, port: int = 0) -> Iterator[str]:
    """The address of the page, served by a real server in a thread."""
    app = create_app(engine, settings or Settings())
    with listening(port) as listener:
        port = listener.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{port}/"  # connections wait in the listener until the server has started
        finally:
            server.should_exit = True
            thread.join(WAIT_S)


def listening(port: int) -> socket.socket:
    """A listener that names its protocol: asyncio turns off Nagle's 40 ms only for connections that do."""
    plain = socket.create_server(("127.0.0.1", port))
    return socket.socket(plain.family, plain.type, socket.IPPROTO_TCP, fileno=plain.detach())


# ----- the browser ----------------------------------------------------------------------------------------------------


def chromium() -> tuple[str, str]:
    """Paths of browser and driver; missing ones are a failure in CI and a skip elsewhere."""
    found = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if None in found:
        message = "no Chromium: apt-get install chromium chromium-driver"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return found  # type: ignore[return-value]  # no None is left


@contextmanager
def browser(folder: Path, *, width: int = 1280, height: int = 900) -> Iterator[WebDriver]:
    """A fresh headless Chromium whose profile is in `folder`; downloads go there too."""
    program, driver_path = chromium()
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*BROWSER_FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_path))
    driver.set_script_timeout(WAIT_S)
    try:
        yield driver
    finally:
        driver.quit()


class PageUser:
    """A user of the page: its actions and the visible results."""

    def __init__(self, driver: WebDriver) -> None:
        self.driver = driver

    def by_id(self, name: str) -> Any:
        """An element."""
        return self.driver.find_element("id", name)

    def run(self, script: str, *arguments: Any) -> Any:
        """JavaScript's answer."""
        return self.driver.execute_script(script, *arguments)

    def wait_for(self, condition: Any, message: str = "") -> Any:
        """Until `condition()` is true."""
        return WebDriverWait(self.driver, WAIT_S, poll_frequency=0.05).until(lambda _: condition(), message)

    def open(self, address: str) -> None:
        """Go to the page, and wait for its first picture."""
        self.driver.get(address)
        self.wait_for(lambda: self.sequence() > 0, "no first picture")

    def sequence(self) -> int:
        """Number of the picture on screen; 0 before the first."""
        return int(self.run("return document.getElementById('picture').dataset.sequence ?? 0"))

    def pixel(self, x: float = 0.5, y: float = 0.5) -> tuple[int, ...]:
        """RGB of the picture on screen at a share of its width and height."""
        script = """
            const canvas = document.getElementById("picture");
            const at = (share, side) => Math.min(side - 1, Math.floor(share * side));
            const [x, y] = [at(arguments[0], canvas.width), at(arguments[1], canvas.height)];
            return [...canvas.getContext("2d").getImageData(x, y, 1, 1).data];
        """
        return tuple(self.run(script, x, y)[:3])

    def errors(self) -> list[str]:
        """The errors on the browser's console, but for connections that tests cut and pictures still on their way as a server ends."""
        logs = [log["message"] for log in self.driver.get_log("browser") if log["level"] == "SEVERE"]
        cut = ("WebSocket connection", "ERR_CONNECTION_REFUSED")
        return [message for message in logs if not any(words in message for words in cut)]
