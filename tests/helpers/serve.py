"""Engines over the model that ships, whose network tests can hold, spoil and count; and servers in a thread."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import uvicorn
from PIL import Image

from sana_sprint.pipelines.text_to_image import SanaSprintPipeline
from sana_sprint.serve.app import create_app
from sana_sprint.serve.engine import Engine, Job
from sana_sprint.serve.settings import Settings

WAIT_S = 120.0  # far more than anything here takes; a test that hangs is to fail


@functools.cache
def emoji() -> SanaSprintPipeline:
    """One for all tests: no call changes it. In fp32, where batches differ from singles by rounding alone."""
    pipeline = SanaSprintPipeline.from_pretrained("emoji", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def running_engine(load: Callable[[], Any] = emoji, **settings: Any) -> Iterator[Engine]:
    """A loaded engine that is closed afterwards."""
    engine = Engine(load, **settings)
    engine.wait_until_loaded(WAIT_S)
    try:
        yield engine
    finally:
        engine.close(timeout_s=0)


class Network:
    """Watches the transformer: each evaluation's batch size; may hold evaluations until told, or change their output."""

    def __init__(self, change: Callable[[torch.Tensor, torch.Tensor], object] | None = None) -> None:
        self.batches: list[int] = []
        self.entered = threading.Semaphore(0)  # one release per evaluation that has begun
        self._held = threading.Event()
        self._held.set()
        self._change = change

    def hold(self) -> None:
        """Let evaluations wait from now on."""
        self._held.clear()

    def go_on(self) -> None:
        """Let them go."""
        self._held.set()

    def wait_until_entered(self) -> None:
        """Until one more evaluation has begun."""
        assert self.entered.acquire(timeout=WAIT_S)

    def before(self, _: Any, arguments: tuple[Any, ...]) -> None:
        self.batches.append(len(arguments[0]))
        self.entered.release()
        assert self._held.wait(WAIT_S)

    def after(self, _: Any, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
        if self._change is not None:
            self._change(output, arguments[3])  # what it returns does not matter


@contextmanager
def watched_network(
    change: Callable[[torch.Tensor, torch.Tensor], object] | None = None,
) -> Iterator[Network]:
    """`change(output (B,C,h,w), guidance (B,))` may write into the network's output or raise."""
    network, transformer = Network(change), emoji().transformer
    handles = [
        transformer.register_forward_pre_hook(network.before),
        transformer.register_forward_hook(network.after),
    ]
    try:
        yield network
    finally:
        network.go_on()
        for handle in handles:
            handle.remove()


def result_of(job: Job) -> Any:
    """A job's result, when it is there."""
    return job.future.result(WAIT_S)


def assert_close(found: Image.Image, expected: Image.Image) -> None:
    """Equal up to one level: a batch sums in another order than a single picture, which can tip a rounding."""
    difference = np.asarray(found, dtype=int) - np.asarray(expected, dtype=int)
    assert np.abs(difference).max() <= 1


@contextmanager
def running_server(engine: Engine, settings: Settings | None = None) -> Iterator[str]:
    """The base URL of a real server in a thread; it closes the engine when it stops."""
    app = create_app(engine, settings or Settings())
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", ws="none"))
    thread = threading.Thread(target=server.run)
    started = threading.Event()
    startup = server.startup

    async def tell(*arguments: Any, **settings: Any) -> None:
        await startup(*arguments, **settings)
        started.set()

    server.startup = tell  # type: ignore[method-assign]  # the server has no event to wait for
    thread.start()
    try:
        assert started.wait(WAIT_S)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(WAIT_S)
