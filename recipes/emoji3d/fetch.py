"""Gets the artwork and the emoji data: `python -m recipes.emoji3d.fetch`.

With npm's client (`npm pack`), from packages that are pinned by version; or from folders that hold them unpacked. The
font of the second style is a Debian package: fonts-noto-color-emoji.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from recipes.emoji3d.artwork import data_folder

ARTWORK_PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
DATA_PACKAGE = "emojibase-data@17.0.0"


def fetch(target: Path, *, artwork: Path | None = None, data: Path | None = None) -> int:
    """Fills `target` with fluent/*.webp and emojibase.json; returns the number of pictures.

    Args:
        target: the folder to fill.
        artwork: the unpacked artwork package; None gets it with npm.
        data: the unpacked data package; None gets it with npm.

    Raises:
        FileNotFoundError: npm or a package's files are missing.
    """
    with tempfile.TemporaryDirectory() as scratch:
        artwork = artwork or _unpacked(ARTWORK_PACKAGE, Path(scratch) / "artwork")
        data = data or _unpacked(DATA_PACKAGE, Path(scratch) / "data")
        pictures = sorted((artwork / "assets").glob("*.webp"))
        if not pictures:
            raise FileNotFoundError(f"{artwork} has no assets/*.webp")
        (target / "fluent").mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            shutil.copy(picture, target / "fluent" / picture.name)
        shutil.copy(data / "en" / "data.json", target / "emojibase.json")
        shutil.copy(data / "LICENSE", target / "emojibase-LICENSE")
    return len(pictures)


def _unpacked(package: str, folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(f"npm is missing, which gets {package}; hint: give the unpacked folders")
    folder.mkdir(parents=True)
    packed = subprocess.run(  # a pinned package, by npm's own client
        [npm, "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
    )
    with tarfile.open(folder / packed.stdout.strip().splitlines()[-1]) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--target", type=Path, default=data_folder(), help="folder to fill (default: data/emoji3d)"
    )
    parser.add_argument("--artwork", type=Path, help=f"folder of {ARTWORK_PACKAGE}, unpacked")
    parser.add_argument("--data", type=Path, help=f"folder of {DATA_PACKAGE}, unpacked")
    arguments = parser.parse_args()
    count = fetch(arguments.target, artwork=arguments.artwork, data=arguments.data)
    print(f"{count} pictures in {arguments.target / 'fluent'}")


if __name__ == "__main__":
    main()
