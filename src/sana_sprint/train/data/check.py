"""A set of pictures looked through before a training: what it holds, and what cannot be used."""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from sana_sprint.resolutions import nearest_bucket
from sana_sprint.train.data.prefetch import read_ahead
from sana_sprint.train.data.readers.base import Unreadable
from sana_sprint.train.data.source import RecordSource, Source, open_source


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
    """The result of a check. Buckets are "height x width" in pixels, with the pictures nearest to each."""

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
    found = Check(source, samples=total, held_out=held_out)
    seen: list[_Seen] = []

    def see(position: int) -> _Seen | Unreadable:
        return _see(opened, position, size, multiple)

    # A function need not be safe to call from several threads.
    read = read_ahead if isinstance(opened, RecordSource) else map
    for _, one in zip(progress(range(total)), read(see, range(total)), strict=True):
        if isinstance(one, Unreadable):
            found.unreadable[one.name] = one.reason
        else:
            seen.append(one)
    _summarise(found, seen)
    return found


@dataclass(frozen=True)
class _Seen:
    """The facts of one picture. Sizes are (height, width)."""

    name: str
    pixels_hash: str
    size: tuple[int, int]
    bucket: tuple[int, int]
    captions: list[str]


def _see(source: Source, position: int, size: int, multiple: int) -> _Seen | Unreadable:
    try:
        pixels, captions = source.sample(position)
    except Unreadable as error:
        return error
    height, width = pixels.shape[:2]
    return _Seen(
        source.name(position),
        hashlib.sha256(f"{height} {width}".encode() + pixels.tobytes()).hexdigest(),
        (height, width),
        nearest_bucket(height, width, size, multiple),
        [caption for caption in captions if caption],
    )


def _summarise(found: Check, seen: Sequence[_Seen]) -> None:
    same: dict[str, list[str]] = {}
    for one in seen:
        same.setdefault(one.pixels_hash, []).append(one.name)
    found.duplicates = [names for names in same.values() if len(names) > 1]
    found.uncaptioned = [one.name for one in seen if not one.captions]
    found.enlarged = [one.name for one in seen if one.size[0] < one.bucket[0] or one.size[1] < one.bucket[1]]
    buckets = Counter(one.bucket for one in seen)
    found.buckets = {f"{height}x{width}": count for (height, width), count in sorted(buckets.items())}
    found.heights = Spread.of([one.size[0] for one in seen])
    found.widths = Spread.of([one.size[1] for one in seen])
    captions = [caption for one in seen for caption in one.captions]
    found.captions_per_picture = Spread.of([len(one.captions) for one in seen])
    found.caption_characters = Spread.of([len(caption) for caption in captions])
    found.caption_words = Spread.of([len(caption.split()) for caption in captions])
