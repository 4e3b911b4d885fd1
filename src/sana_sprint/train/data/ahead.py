"""Reading while others compute."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")
NUM_THREADS = min(16, os.cpu_count() or 1)  # decoding and resizing let other threads run


def read_ahead(read: Callable[[int], Result], positions: Iterable[int]) -> Iterator[Result]:
    """`map(read, positions)` by several threads, in order, with two results for each thread under way at most."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        running: deque[Future[Result]] = deque()
        for position in positions:
            running.append(pool.submit(read, position))
            if len(running) == 2 * NUM_THREADS:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
