"""Training samples by index: sample i is the same on every machine, so a resumed run needs only its step."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from sana_sprint.models.autoencoder import AutoencoderDC

VALIDATION_START = 1_000_000_000  # sample indices from here on are never trained on
_PICTURES = {".jpeg", ".jpg", ".png", ".webp"}
Sample = tuple[np.ndarray, tuple[str, ...]]
Source = Callable[[int], Sample]


def open_source(source: str) -> Source:
    """A function from an index to (uint8 (H,W,3), captions).

    Args:
        source: "module:function", where the function returns the picture alone, or with a caption, or with several
            that are all true of it; or a folder of pictures with `<name>.txt` captions beside them, over which
            the index wraps around.

    Raises:
        ValueError: neither can be found, or the folder has no pictures.
    """
    if ":" in source:
        return _from_function(source)
    folder = Path(source)
    if not folder.is_dir():
        raise ValueError(f"data source {source!r} is neither a folder nor module:function")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _PICTURES)
    if not files:
        raise ValueError(f"{folder} has no pictures; looked for {', '.join(sorted(_PICTURES))}")
    return lambda index: _read(files[index % len(files)])


def pictures(source: Source, indices: Sequence[int]) -> tuple[Tensor, list[tuple[str, ...]]]:
    """A batch: (B,3,H,W) fp32 in [-1,1] in channels_last memory, and each picture's captions."""
    samples = [source(index) for index in indices]
    stacked = torch.from_numpy(np.stack([image for image, _ in samples]))
    return stacked.permute(0, 3, 1, 2).float().div(127.5).sub(1), [captions for _, captions in samples]


def channels_last(autoencoder: AutoencoderDC) -> AutoencoderDC:
    """The autoencoder with its weights in channels_last memory, as batches of `pictures` are: no copies between layers."""
    autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs leave it out
    return autoencoder


def _from_function(source: str) -> Source:
    module, _, name = source.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"data source {source!r} cannot be imported: {error}") from error

    def sample(index: int) -> Sample:
        made: Any = function(index)
        pixels, captions = made if isinstance(made, tuple) else (made, "")
        return pixels, (captions,) if isinstance(captions, str) else tuple(captions)

    return sample


def _read(path: Path) -> Sample:
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"cannot read the picture {path}: {error}") from error
    caption = path.with_suffix(".txt")
    return pixels, (caption.read_text(encoding="utf-8").strip() if caption.is_file() else "",)
