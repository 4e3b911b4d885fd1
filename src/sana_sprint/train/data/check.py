"""A set of pictures looked through before a training: what it holds, and what cannot be used."""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from sana_sprint.resolutions import nearest_bucket
from sana_sprint.train.data.records import Unreadable
from sana_sprint.train.data.source import RecordSource, open_source


@dataclass
class Spread:
    """Smallest, middle and largest of some numbers; zeros for none."""

    min: float = 0
    median: float = 0
    max: float = 0

    @classmethod
    def of(cls, values: list[int]) -> Spread:
        return cls(min(values), statistics.median(values), max(values)) if values else cls()


@dataclass
class Check:
    """What was found. Buckets are "height x width" in pixels, with the pictures nearest to each."""

    source: str
    samples: int = 0
    held_out: int = 0  # of the samples, for validation
    unreadable: dict[str, str] = field(default_factory=dict)  # name -> reason
    uncaptioned: list[str] = field(default_factory=list)
    duplicates: list[list[str]] = field(default_factory=list)  # names of pictures with the same pixels
    buckets: dict[str, int] = field(default_factory=dict)
    enlarged: list[str] = field(default_factory=list)  # smaller than their bucket
    widths: Spread = field(default_factory=Spread)
    heights: Spread = field(default_factory=Spread)
    captions_per_picture: Spread = field(default_factory=Spread)
    caption_characters: Spread = field(default_factory=Spread)
    caption_words: Spread = field(default_factory=Spread)

    @property
    def has_captions(self) -> bool:
        """Whether any picture has one. A set without is for an autoencoder, and nothing is missing from it."""
        return len(self.uncaptioned) < self.samples - len(self.unreadable)

    @property
    def unusable(self) -> list[str]:
        """Names of samples that a training skips, or that lack a caption where others have one."""
        return [*self.unreadable, *(self.uncaptioned if self.has_captions else [])]


def check_source(
    source: str,
    *,
    size: int,
    multiple: int = 32,
    limit: int | None = None,
    progress: Callable[[range], Iterable[int]] = iter,
) -> Check:
    """Reads and decodes every sample of a source.

    Args:
        source: see `open_source`.
        size: native side of the model in pixels, for the buckets.
        multiple: pixels per token of the model.
        limit: look at this many samples only; needed for a function, which never ends.
        progress: wraps the loop over the samples.

    Raises:
        ValueError: the source cannot be opened, or `size` has no buckets.
    """
    opened = open_source(source)
    if isinstance(opened, RecordSource):
        total, held_out = len(opened.records), len(opened.validation)
        total = min(total, limit or total)
    elif limit is None:
        raise ValueError(f"{source} is a function, which never ends: set a limit of samples to look at")
    else:
        total, held_out = limit, 0
    found, tally = Check(source, samples=total, held_out=held_out), _Tally()
    for position in progress(range(total)):
        try:
            pixels, texts = opened.sample(position)
        except Unreadable as error:
            found.unreadable[error.name] = error.reason
            continue
        height, width = pixels.shape[:2]
        tally.add(opened.name(position), pixels, texts, nearest_bucket(height, width, size, multiple))
    tally.report(found)
    return found


class _Tally:
    """What is counted on the way: names, sizes and captions of the readable pictures, in their order."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.hashes: list[str] = []
        self.sizes: list[tuple[int, int]] = []  # (height, width)
        self.buckets: list[tuple[int, int]] = []
        self.captions: list[list[str]] = []

    def add(self, name: str, pixels: np.ndarray, texts: Sequence[str], bucket: tuple[int, int]) -> None:
        height, width = pixels.shape[:2]
        self.names.append(name)
        self.hashes.append(hashlib.sha256(f"{height} {width}".encode() + pixels.tobytes()).hexdigest())
        self.sizes.append((height, width))
        self.buckets.append(bucket)
        self.captions.append([text for text in texts if text])

    def report(self, found: Check) -> None:
        same: dict[str, list[str]] = {}
        for name, key in zip(self.names, self.hashes, strict=True):
            same.setdefault(key, []).append(name)
        found.duplicates = [names for names in same.values() if len(names) > 1]
        found.uncaptioned = [name for name, texts in zip(self.names, self.captions, strict=True) if not texts]
        found.enlarged = [
            name
            for name, size, bucket in zip(self.names, self.sizes, self.buckets, strict=True)
            if size[0] < bucket[0] or size[1] < bucket[1]
        ]
        found.buckets = {
            f"{height}x{width}": n for (height, width), n in sorted(Counter(self.buckets).items())
        }
        found.heights = Spread.of([height for height, _ in self.sizes])
        found.widths = Spread.of([width for _, width in self.sizes])
        every = [text for texts in self.captions for text in texts]
        found.captions_per_picture = Spread.of([len(texts) for texts in self.captions])
        found.caption_characters = Spread.of([len(text) for text in every])
        found.caption_words = Spread.of([len(text.split()) for text in every])
