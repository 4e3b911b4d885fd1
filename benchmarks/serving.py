"""Measures the server under load from many clients, with and without batching.

    python benchmarks/serving.py --clients 64 --seconds 60

Starts `sana-sprint serve` itself, in a process of its own. Each client asks for one picture after the other; refused
with 429 it waits as long as Retry-After says. Meanwhile another process asks `/health` every 100 ms, as a monitor would.
Then the same closed loop of a few clients runs against a server that draws together (`--max-batch`) and one that draws
one at a time. Prints a table and one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import httpx2

PROMPTS = ("a cat", "two apples on a blue background", "a red heart", "a dog and a banana")
HEALTH_EVERY_S = 0.1
START_S = 600.0  # to load the model on a busy machine


@contextmanager
def server(model: str, max_batch: int, max_queue: int) -> Iterator[str]:
    """The URL of a server that is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--model", model, "--port", port, "--max-batch", max_batch, "--max-queue", max_queue]
    command = [sys.executable, "-m", "sana_sprint", "serve", *map(str, options)]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_S
        while not is_ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the server did not start")
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait()


def is_ready(url: str) -> bool:
    try:
        answer = httpx2.get(f"{url}/ready")
    except httpx2.TransportError:
        return False
    if answer.json()["status"] == "failed":
        raise SystemExit("the model could not be loaded")
    return answer.status_code == 200


@contextmanager
def monitor(url: str) -> Iterator[list[float]]:
    """Fills the list with seconds that `/health` took inside, measured in a process that does nothing else."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=watch, args=(url, there), daemon=True)
    process.start()
    here.recv()  # it has started, which takes longer than a request
    answers: list[float] = []
    yield answers
    here.send(None)
    answers += here.recv()
    process.join()


def watch(url: str, pipe: Connection) -> None:
    answers = []
    with httpx2.Client(base_url=url, timeout=120.0) as http:
        http.get("/health").raise_for_status()  # connected
        pipe.send(None)
        while not pipe.poll(HEALTH_EVERY_S):
            started = time.perf_counter()
            http.get("/health").raise_for_status()
            answers.append(time.perf_counter() - started)
    pipe.send(answers)


class Load:
    """The answers that a number of clients received in a number of seconds."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()  # answered, refused (429), lost (anything else)
        self.latencies: list[float] = []
        self.health: list[float] = []
        self.seconds = 0.0
        self.cpu_s = 0.0  # of the server: says what a picture costs even where other work takes turns

    async def run(self, url: str, clients: int, seconds: float, steps: int) -> Load:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx2.AsyncClient(base_url=url, timeout=120.0, limits=limits) as http:
            with monitor(url) as answers:
                started = time.perf_counter()
                cpu_s = await cpu_seconds(http)
                until = started + seconds
                await asyncio.gather(*(self._client(http, i, until, steps) for i in range(clients)))
                self.seconds = time.perf_counter() - started
                self.cpu_s = await cpu_seconds(http) - cpu_s
            self.health = list(answers)
        return self

    async def _client(self, http: httpx2.AsyncClient, number: int, until: float, steps: int) -> None:
        body = {"prompt": PROMPTS[number % len(PROMPTS)], "steps": steps, "output_format": "webp"}
        while (now := time.perf_counter()) < until:
            try:
                answer = await http.post("/v1/images/generations", json=body)
            except httpx2.HTTPError as error:
                self.outcomes[f"lost: {type(error).__name__}"] += 1
                continue
            if answer.status_code == 200:
                self.outcomes["answered"] += 1
                self.latencies.append(time.perf_counter() - now)
            elif answer.status_code == 429:
                self.outcomes["refused"] += 1
                pause = float(answer.headers["retry-after"])
                await asyncio.sleep(min(pause, max(0.0, until - time.perf_counter())))
            else:
                self.outcomes[f"lost: {answer.status_code}"] += 1

    def summary(self) -> dict[str, object]:
        lost = {name: count for name, count in self.outcomes.items() if name.startswith("lost")}
        return {
            "answered": self.outcomes["answered"],
            "refused": self.outcomes["refused"],
            "lost": lost or 0,
            "pictures_per_s": round(self.outcomes["answered"] / self.seconds, 2),
            "cpu_ms_per_picture": round(1000 * self.cpu_s / max(1, self.outcomes["answered"]), 1),
            "latency_s": quantiles(self.latencies),
            "health_ms": {name: round(1000 * value, 1) for name, value in quantiles(self.health).items()},
        }


async def cpu_seconds(http: httpx2.AsyncClient) -> float:
    lines = (await http.get("/metrics")).text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("process_cpu_seconds_total"))


def quantiles(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": round(cuts[49], 4), "p99": round(cuts[98], 4), "max": round(max(values), 4)}


def measure(options: argparse.Namespace, max_batch: int, clients: int) -> dict[str, object]:
    with server(options.model, max_batch, options.max_queue) as url:
        asyncio.run(Load().run(url, min(clients, 2), 1.0, options.steps))  # what is set up once is not timed
        return asyncio.run(Load().run(url, clients, options.seconds, options.steps)).summary()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--max-queue", type=int, default=32)
    options = parser.parse_args()
    # As many clients as a batch has places: the same load for both, without queueing for a second batch.
    rows = {
        f"{options.clients} clients": measure(options, options.max_batch, options.clients),
        f"{options.max_batch} clients, together": measure(options, options.max_batch, options.max_batch),
        f"{options.max_batch} clients, one at a time": measure(options, 1, options.max_batch),
    }
    for name, row in rows.items():
        print(f"{name:28}", *(f"{key} {value}" for key, value in row.items()), sep="  ")
    print(json.dumps({**vars(options), "rows": rows}))


if __name__ == "__main__":
    main()
