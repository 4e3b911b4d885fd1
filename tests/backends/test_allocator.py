"""Memory that a large call frees is kept until its end and then given back; nothing happens where it is not ours to do."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from sana_sprint.backends.cpu import allocator
from sana_sprint.backends.cpu.allocator import MANY_PIXELS, freed_memory_kept, kept_while_drawing

# In a process of its own: the test runner's heap has holes. Tensors above glibc's own 32 MiB, and what zeroing them cost.
MEASURE = """
import resource, torch
from sana_sprint.backends.cpu.allocator import glibc, freed_memory_kept
torch.set_num_threads(1)
def faults(kept):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    with freed_memory_kept(kept):
        for _ in range(24):
            torch.zeros(64 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
faults(False)
start = resident()
print(faults(False), faults(True), resident() - start)
print(glibc() is not None)
"""
has_glibc = pytest.mark.skipif(allocator.glibc() is None, reason="needs glibc, with its own settings")


def measure(**environment: str) -> tuple[list[int], bool]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    numbers, active = done.stdout.splitlines()
    return [int(number) for number in numbers.split()], active == "True"


@has_glibc
def test_freed_memory_is_used_again_and_given_back():
    (usual, kept, grown), active = measure()
    pages = (64 << 20) // os.sysconf("SC_PAGESIZE")
    assert active
    assert usual > 23 * pages  # each of the 24 anew
    assert kept < 12 * pages  # the first few, until there is a hole that fits
    assert grown < 16 << 20  # and given back


@has_glibc
@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
def test_an_allocator_that_was_set_up_is_left_alone(name):
    (usual, kept, _), active = measure(**{name: str(1 << 20)})
    assert not active
    assert kept == pytest.approx(usual, rel=0.1)


class Library:
    """A stand-in for glibc that notes what it is asked for."""

    def __init__(self):
        self.calls = []

    def mallopt(self, parameter, value):
        self.calls.append((parameter, value))

    def malloc_trim(self, pad):
        self.calls.append("trim")


@pytest.fixture
def library(monkeypatch):
    library = Library()
    monkeypatch.setattr(allocator, "glibc", lambda: library)
    return library


def test_calls_beside_each_other_end_together(library):
    entered, leave = threading.Event(), threading.Event()

    def other():
        with freed_memory_kept():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with freed_memory_kept():
        thread.start()
        assert entered.wait(10)
        assert len(library.calls) == 2  # the first of them alone
    assert len(library.calls) == 2  # the other is not done
    leave.set()
    thread.join()
    assert len(library.calls) == 5
    assert library.calls[-1] == "trim"
    with freed_memory_kept(False):
        assert len(library.calls) == 5


def test_an_error_ends_it(library):
    with pytest.raises(ValueError, match="within"), freed_memory_kept():
        raise ValueError("within")
    assert library.calls[-1] == "trim"


@pytest.mark.parametrize(
    ("device", "pixels", "is_kept"),
    [("cpu", MANY_PIXELS, True), ("cpu", MANY_PIXELS - 1, False), ("cuda", MANY_PIXELS, False)],
)
def test_it_is_for_large_pictures_on_a_cpu(library, device, pixels, is_kept):
    with kept_while_drawing(torch.device(device), pixels):
        assert bool(library.calls) == is_kept
