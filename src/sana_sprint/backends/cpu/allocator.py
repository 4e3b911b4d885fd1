"""Keeping freed memory for the next allocation, on Linux with glibc."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache

import torch

MANY_PIXELS = 512 * 512  # with fewer, memory given to the system is soon asked for again
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_KEPT = 2**31 - 1  # bytes, the most that mallopt takes
# Where glibc's own, moving threshold ends up in a process that frees larger blocks than that.
_USUAL = 32 << 20
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")

_lock = threading.Lock()
_calls = 0


def kept_while_drawing(device: torch.device, pixels: int) -> AbstractContextManager[None]:
    """`freed_memory_kept` where it pays: while so many pixels are drawn in one call on a CPU."""
    return freed_memory_kept(device.type == "cpu" and pixels >= MANY_PIXELS)


@contextmanager
def freed_memory_kept(enabled: bool = True) -> Iterator[None]:
    """Within, memory that is freed stays with the process for what is allocated next; on leaving it is given back.

    A large tensor is otherwise given to the system as it is freed, and the next one's pages are zeroed one by one as they
    are first touched: 0.4 ms a MiB here, or a twentieth of a decode at 1024 px. Does nothing without glibc, nor where the
    environment sets its allocator up. The thresholds are the process's, not the thread's.
    """
    library = glibc() if enabled else None
    if library is None:
        yield
        return
    _enter(library)
    try:
        yield
    finally:
        _leave(library)


def _enter(library: ctypes.CDLL) -> None:
    global _calls
    with _lock:
        _calls += 1
        if _calls == 1:
            library.mallopt(_MMAP_THRESHOLD, _KEPT)
            library.mallopt(_TRIM_THRESHOLD, _KEPT)


def _leave(library: ctypes.CDLL) -> None:
    global _calls
    with _lock:
        _calls -= 1
        if _calls == 0:
            library.mallopt(_MMAP_THRESHOLD, _USUAL)
            library.mallopt(_TRIM_THRESHOLD, 2 * _USUAL)  # glibc's own proportion
            library.malloc_trim(0)


@cache
def glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc with its own settings."""
    if any(name in os.environ for name in _SETTINGS):
        return None
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  # an AttributeError where the C library is another
        library.malloc_trim.argtypes = [ctypes.c_size_t]
    except (AttributeError, OSError, TypeError):
        return None
    return library
