"""Small sets of pictures, the same in every form that a source can have."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

CAPTIONS = (("a red picture", "something red"), ("a green picture",), ("a blue picture", "the sea", "blue"))


def png(index: int, size: tuple[int, int] = (6, 4)) -> bytes:
    """An encoded picture of noise, (width, height), different for each index."""
    noise = np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return encoded(Image.fromarray(noise))


def encoded(picture: Image.Image, kind: str = "PNG", **settings: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def write_folder(folder: Path, pictures: Sequence[bytes], captions: Sequence[Sequence[str]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, (picture, texts) in enumerate(zip(pictures, captions, strict=True)):
        (folder / f"{i:04d}.png").write_bytes(picture)
        (folder / f"{i:04d}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return folder


def write_jsonl(folder: Path, pictures: Sequence[bytes], captions: Sequence[Sequence[str]]) -> Path:
    write_folder(folder / "pictures", pictures, [[] for _ in pictures])
    rows = [
        {"image": f"pictures/{i:04d}.png", "captions": list(texts), "score": 0.5}
        for i, texts in enumerate(captions)
    ]
    path = folder / "set.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def write_csv(folder: Path, pictures: Sequence[bytes], captions: Sequence[Sequence[str]]) -> Path:
    """As spreadsheets write it: with a byte order mark."""
    write_folder(folder / "pictures", pictures, [[] for _ in pictures])
    path = folder / "set.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "caption", "caption_2", "caption_3"])
        for i, texts in enumerate(captions):
            writer.writerow([f"pictures/{i:04d}.png", *texts, *[""] * (3 - len(texts))])
    return path


def write_parquet(folder: Path, pictures: Sequence[bytes], captions: Sequence[Sequence[str]]) -> Path:
    """Two files, two rows to a row group, pictures as `datasets` writes them."""
    import pyarrow
    from pyarrow import parquet

    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"image": {"bytes": picture, "path": None}, "text": list(texts), "width": 6}
        for picture, texts in zip(pictures, captions, strict=True)
    ]
    for name, part in (("a.parquet", rows[:-1]), ("b.parquet", rows[-1:])):
        parquet.write_table(pyarrow.Table.from_pylist(part), folder / name, row_group_size=2)
    return folder


def write_tar(folder: Path, pictures: Sequence[bytes], captions: Sequence[Sequence[str]]) -> Path:
    """Two tars; each sample has also a mask and a statistics file, which are not its picture or caption."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = list(enumerate(zip(pictures, captions, strict=True)))
    for name, part in (("a.tar", samples[:-1]), ("b.tar", samples[-1:])):
        with tarfile.open(folder / name, "w") as archive:
            for i, (picture, texts) in part:
                key = f"deep/{i:04d}"
                files = {"mask.png": png(99), "png": picture, "cls": b"7"}
                files["json"] = json.dumps(
                    {"caption": texts[0] if texts else "", "captions": list(texts)}
                ).encode()
                for suffix, data in files.items():
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return folder


Writer = Callable[[Path, Sequence[bytes], Sequence[Sequence[str]]], Path]
WRITERS: dict[str, Writer] = {
    "folder": write_folder,
    "jsonl": write_jsonl,
    "csv": write_csv,
    "parquet": write_parquet,
    "tar": write_tar,
}
