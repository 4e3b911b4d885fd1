"""A folder of pictures, at any depth, with captions in files of the same name beside them."""

from __future__ import annotations

from pathlib import Path

from sana_sprint.train.data.readers.base import PICTURE_SUFFIXES, Record, Unreadable, sidecar_captions


class FolderRecords:
    """See `records.Records`. Hidden files and folders are left out."""

    def __init__(self, folder: Path) -> None:
        found = (path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
        self.paths = sorted(path for path in found if not _is_hidden(path.relative_to(folder)))
        if not self.paths:
            raise ValueError(f"{folder} has no pictures; looked for {', '.join(PICTURE_SUFFIXES)}")

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def __getitem__(self, index: int) -> Record:
        path = self.paths[index]

        def beside(suffix: str) -> bytes | None:
            sidecar = path.with_suffix(suffix)
            return sidecar.read_bytes() if sidecar.is_file() else None

        try:
            captions = sidecar_captions(beside)
        except ValueError as error:
            raise Unreadable(str(path), f"its captions: {error}") from error
        return Record(str(path), path.read_bytes(), captions)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
