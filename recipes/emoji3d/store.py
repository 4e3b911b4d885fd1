"""Stores samples as tar files, so that a GPU need not wait for them: `python -m recipes.emoji3d.store`.

A function makes some hundred samples a second in one process; training on a GPU takes thousands. The stored sets are data
sources as any other: a folder of tar files with a picture and its captions for each sample.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import tarfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

_PER_TAR = 4096


def store(source: str, folder: Path, count: int, *, workers: int = 1) -> int:
    """Writes the first `count` samples of a function into tar files; returns the number of files.

    Files that are there are not made again, so that an interrupted call can be repeated.

    Args:
        source: "module:function", as training takes it.
        folder: receives the tar files.
        count: how many samples.
        workers: processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, count, _PER_TAR)
    write = partial(_write, source, folder, count)
    if workers == 1:
        return sum(map(write, starts))
    with ProcessPoolExecutor(workers) as pool:
        return sum(pool.map(write, starts))


def _write(source: str, folder: Path, count: int, start: int) -> int:
    path = folder / f"{start:08d}.tar"
    if path.is_file():
        return 1
    module, _, name = source.partition(":")
    function = getattr(importlib.import_module(module), name)
    partial_path = path.with_suffix(".partial")
    with tarfile.open(partial_path, "w") as archive:
        for index in range(start, min(start + _PER_TAR, count)):
            made = function(index)
            pixels, captions = made if isinstance(made, tuple) else (made, ())
            _add(archive, f"{index:08d}.png", _png(pixels))
            if captions:
                _add(archive, f"{index:08d}.txt", "\n".join(captions).encode())
    os.replace(partial_path, path)
    return 1


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", help="such as recipes.emoji3d.samples:all_256")
    parser.add_argument("folder", type=Path, help="such as data/emoji3d/scenes-256")
    parser.add_argument("--count", type=int, default=400_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    files = store(arguments.source, arguments.folder, arguments.count, workers=arguments.workers)
    print(f"{arguments.count} samples in {files} files in {arguments.folder}")


if __name__ == "__main__":
    main()
