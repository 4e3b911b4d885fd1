"""Prefetches samples in background threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

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


class Ahead(Generic[Result]):
    """`read`, some of whose results are being made by threads when they are asked for.

    Prefetching changes when a result is ready, never its content. A result is kept until it is fetched, once.

    Args:
        read: by position; the same result every time.
        is_concurrent: whether threads may call it; if not, nothing is read ahead.
    """

    def __init__(self, read: Callable[[int], Result], *, is_concurrent: bool) -> None:
        self.read = read
        self._pool = ThreadPoolExecutor(NUM_THREADS) if is_concurrent else None
        self.coming: dict[int, Future[Result]] = {}

    def expect(self, positions: Iterable[int]) -> None:
        """Starts to read what is not under way already."""
        if self._pool is not None:
            for position in positions:
                if position not in self.coming:
                    self.coming[position] = self._pool.submit(self.read, position)

    def __call__(self, position: int) -> Result:
        """The result, waited for or read now. Raises what `read` raises."""
        coming = self.coming.pop(position, None)
        return self.read(position) if coming is None else coming.result()
