"""Releases the memory of weights in mapped files; the system reads them again when they are accessed.

Loaded weights are private, unmodified pages of their files. Released from the process, they stay in the system's file cache
while there is room, so that the next access costs page faults and no reading.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import nn

_SMAPS = Path("/proc/self/smaps")
_DONT_NEED = 4  # MADV_DONTNEED of Linux


@dataclass(frozen=True)
class _Mapping:
    start: int
    end: int
    is_clean: bool  # private pages of a file, none of them written to


def give_back(module: nn.Module) -> int:
    """Releases the pages of the mapped files that hold a module's weights; returns the bytes of address space released.

    Nothing is lost: a file with a page modified in memory stays, and so do weights that were cast, moved or created.
    Linux only, a no-op elsewhere. A module in use reads its pages again.
    """
    if not sys.platform.startswith("linux") or not _SMAPS.exists():
        return 0
    addresses = [
        tensor.data_ptr()
        for tensor in module.state_dict(keep_vars=True).values()
        if tensor.device.type == "cpu"
    ]
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    given = 0
    for mapping in _mappings(_SMAPS.read_text()):
        if not mapping.is_clean or not any(mapping.start <= each < mapping.end for each in addresses):
            continue
        if madvise(mapping.start, mapping.end - mapping.start, _DONT_NEED) == 0:
            given += mapping.end - mapping.start
    return given


def _mappings(smaps: str) -> Iterator[_Mapping]:
    """The mappings listed in a /proc/PID/smaps: see proc_pid_smaps(5)."""
    header: list[str] = []
    kib: dict[str, int] = {}
    for line in [*smaps.splitlines(), "0-0 end"]:
        first, *rest = line.split()
        if first.endswith(":"):
            if len(rest) == 2 and rest[1] == "kB":
                kib[first[:-1]] = int(rest[0])
            continue
        if header:
            start, end = (int(each, 16) for each in header[0].split("-"))
            # addresses permissions offset device inode path
            is_of_file = len(header) > 5 and header[4] != "0" and header[5].startswith("/")
            is_private = header[1].endswith("p")
            # A page of such a mapping that is written to becomes an anonymous copy. ("Dirty" may also be the file itself,
            # for some seconds after it was saved.)
            is_unwritten = kib.get("Anonymous", -1) == 0 and kib.get("Swap", 0) == 0
            yield _Mapping(start, end, is_of_file and is_private and is_unwritten)
        header, kib = [first, *rest], {}
