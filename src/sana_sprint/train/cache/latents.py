"""Latents of a set of pictures, computed once and kept on disk."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sana_sprint.models.autoencoder import AutoencoderDC
from sana_sprint.resolutions import PIXELS_AT_ONCE
from sana_sprint.train.cache.files import Part, cut, digest, make_parts, read_part, write_part
from sana_sprint.train.data.pictures import fit_bucket, to_tensor
from sana_sprint.train.data.prefetch import read_ahead
from sana_sprint.train.data.readers.base import Sample, Unreadable
from sana_sprint.train.data.sampler import BucketOrder
from sana_sprint.train.data.source import (
    MAX_BAD_FRACTION,
    VALIDATION_START,
    RecordSource,
    Source,
    open_source,
    refuse_too_many,
)
from sana_sprint.train.sections import LatentRun

_FORMAT = "latents 2: bf16, of a bf16 autocast"  # part of every key; changes with what the files hold
_Shape = tuple[int, int, int]


class LatentCache:
    """Latents of unit variance and one or more captions for each, by index; shapes may differ.

    The latents stay on disk, mapped into memory; captions are in memory.
    """

    def __init__(
        self,
        blocks: Sequence[Tensor],
        captions: Sequence[Sequence[str]],
        facts: Mapping[str, str] | None = None,
    ) -> None:
        """Args: blocks of latents, each (n,C,h,w); the captions of all, in the blocks' order; `stage.Stage.data`."""
        self.blocks = blocks
        self.captions = captions
        self.facts = facts or {}
        self._starts = [0, *itertools.accumulate(map(len, blocks))]
        indices = torch.split(torch.arange(len(captions)), [len(block) for block in blocks])
        shapes = [_shape(block) for block in blocks]
        # Shape (C,h,w) -> indices of its latents.
        self.buckets = {
            shape: torch.cat([own for own, other in zip(indices, shapes, strict=True) if other == shape])
            for shape in dict.fromkeys(shapes)
        }

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def shape(self) -> _Shape:
        """(C,h,w) of most latents."""
        return max(self.buckets, key=lambda shape: len(self.buckets[shape]))

    def shuffled(self, indices: range, *, batch_size: int, seed: int) -> Tensor:
        """Indices of the samples at these positions of the training stream, all of one shape: see `BucketOrder`.

        Args:
            indices: positions of one batch, or of a part of one.
            batch_size: positions of a batch.
            seed: of the order.
        """
        return BucketOrder(list(self.buckets.values()), batch_size, seed)(indices)

    def batch(self, indices: Tensor) -> tuple[Tensor, list[str]]:
        """(B,C,h,w) fp32 at these indices, and for each one of its captions, drawn by torch's generator.

        Raises:
            ValueError: their shapes differ.
        """
        latents = self.latents(indices)
        chosen = torch.rand(len(indices)).tolist()
        captions = [self.captions[i] for i in indices.tolist()]
        drawn = [texts[int(part * len(texts))] for texts, part in zip(captions, chosen, strict=True)]
        return latents, drawn

    def latents(self, indices: Tensor) -> Tensor:
        """(B,C,h,w) fp32 at these indices. Raises ValueError if their shapes differ."""
        latents = [self._latent(i) for i in indices.tolist()]
        if len(shapes := {tuple(latent.shape) for latent in latents}) > 1:
            raise ValueError(f"latents of one batch must have one shape, got {', '.join(map(str, shapes))}")
        return torch.stack(latents).float()

    def _latent(self, index: int) -> Tensor:
        block = bisect.bisect_right(self._starts, index) - 1
        return self.blocks[block][index - self._starts[block]]


def latents_of_run(
    config: LatentRun,
    autoencoder: AutoencoderDC,
    *,
    num_validation: int,
    report: Callable[[str], None],
) -> tuple[LatentCache, list[str]]:
    """The latents that a run trains on, cached beside its output, and captions of pictures that it does not train on."""
    data = config.data
    source = open_source(data.source, max_bad=data.max_bad_fraction)
    cache = cached_latents(
        config.output.parent,
        source,
        data.num_samples,
        autoencoder,
        report=report,
        size=data.size,
        max_bad=data.max_bad_fraction,
    )
    return cache, [source(VALIDATION_START + i)[1][0] for i in range(num_validation)]


def cached_latents(
    folder: Path,
    source: str | Source,
    num_samples: int,
    autoencoder: AutoencoderDC,
    *,
    report: Callable[[str], None],
    size: int | None = None,
    max_bad: float = MAX_BAD_FRACTION,
) -> LatentCache:
    """The first `num_samples` training samples of a source, or all if it has fewer, encoded.

    Args:
        folder: receives `latents/`, a file for every 512 samples, named by a hash of the samples' pictures and
            captions, the size, and the autoencoder's weights and config. Files that are there are not made again.
            Several processes share the work.
        source: open, or as `data.open_source` takes it.
        num_samples: at most.
        autoencoder: its encoder and scaling factor are used, under bf16 autocast.
        report: receives a line about the samples, and about every one that is skipped.
        size: native side in pixels: pictures are scaled and cropped to the nearest of its aspect buckets
            (`resolutions.buckets`). None: they must fit the autoencoder as they are.
        max_bad: part of the samples, below 1, that may be unreadable, and that may be without captions.

    Raises:
        ValueError: more are; or a picture does not fit.
    """
    opened = open_source(source) if isinstance(source, str) else source
    positions = opened.training[:num_samples]
    encoder = _Encoder(opened, autoencoder, size)

    def make(part: range) -> tuple[Path, str]:
        chosen = positions[part.start : part.stop]
        samples = opened.digest(chosen)
        path = encoder.path(folder, samples)
        if not path.is_file():
            encoder.write(path, chosen)
            # Here too, not only after hours of encoding.
            refuse_too_many(encoder.skipped, len(positions), max_bad)
        return path, samples

    made = make_parts(len(positions), make, label="latents")
    parts = {part: read_part(path) for part, (path, _) in made.items()}
    skipped, uncaptioned = _problems(parts, lambda i: opened.name(positions[i]))
    for name, reason in skipped.items():
        report(f"skipped {name}: {reason}")
    for problems in (skipped, uncaptioned):
        refuse_too_many(problems, len(positions), max_bad)
    cache = LatentCache(
        [tensors[name] for tensors, facts in parts.values() for name in facts["captions"]],
        _captions(parts.values()),
        _identity(len(positions), [samples for _, samples in made.values()], encoder.settings),
    )
    whole = f" of {len(opened.training)}" if isinstance(opened, RecordSource) else ""
    found = f"{len(cache.buckets)} shapes; {len(skipped)} unreadable, {len(uncaptioned)} without caption"
    report(f"latents: {len(cache)}{whole} in {folder / 'latents'}, in {found}")
    return cache


def _identity(num_samples: int, samples: Sequence[str], settings: str) -> dict[str, str]:
    """The facts of the data that a checkpoint stores; a run resumes only with equal ones."""
    return {
        "samples": str(num_samples),
        "pictures and captions": digest(*samples)[:16],
        "autoencoder and size": settings[:16],
    }


def latent_files(
    folder: Path, source: Source, num_samples: int, autoencoder: AutoencoderDC, size: int | None = None
) -> tuple[list[Path], dict[str, str]]:
    """The files that `cached_latents` with these arguments reads, whether they are there or not, and its cache's facts."""
    positions = source.training[:num_samples]
    encoder = _Encoder(source, autoencoder, size)
    samples = [source.digest(positions[part.start : part.stop]) for part in cut(len(positions))]
    files = [encoder.path(folder, each) for each in samples]
    return files, _identity(len(positions), samples, encoder.settings)


def captions_of(files: Iterable[Path]) -> list[Sequence[str]]:
    """Each sample's captions in these files of the cache, in order."""
    return _captions(map(read_part, files))


def _captions(parts: Iterable[Part]) -> list[Sequence[str]]:
    return [texts for _, facts in parts for block in facts["captions"].values() for texts in block]


def _problems(parts: dict[range, Part], name: Callable[[int], str]) -> tuple[dict[str, str], dict[str, str]]:
    """(unreadable samples, samples without caption), by name; `name` is that of a sample's number."""
    skipped = {name(part[i]): reason for part, (_, facts) in parts.items() for i, reason in facts["skipped"]}
    uncaptioned = {
        name(part[i]): "no caption" for part, (_, facts) in parts.items() for i in facts["uncaptioned"]
    }
    return skipped, uncaptioned


@dataclass
class _Bucket:
    """Samples of one shape: all captions, the latents so far, and the pictures that wait for a batch to fill."""

    captions: list[Sequence[str]] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    pending: list[np.ndarray] = field(default_factory=list)


class _Encoder:
    """Makes parts of the cache."""

    def __init__(self, source: Source, autoencoder: AutoencoderDC, size: int | None) -> None:
        self.source, self.autoencoder, self.size = source, autoencoder, size
        self.skipped: dict[str, str] = {}  # name -> reason, of all parts written here
        self.settings = digest(_FORMAT, size, autoencoder.config, autoencoder.encoder)

    def path(self, folder: Path, samples: str) -> Path:
        """The file of samples with this hash."""
        return folder / "latents" / f"{digest(self.settings, samples)[:32]}.safetensors"

    def write(self, path: Path, positions: Sequence[int]) -> None:
        """Encodes samples and writes them, those of one shape as one tensor."""
        buckets: dict[str, _Bucket] = {}
        skipped: list[tuple[int, str]] = []
        uncaptioned: list[int] = []
        read = read_ahead if self.source.is_concurrent else map
        for i, sample in enumerate(read(self._read, positions)):
            if isinstance(sample, Unreadable):
                skipped.append((i, sample.reason))
                self.skipped[sample.name] = sample.reason
                continue
            pixels, texts = sample
            bucket = buckets.setdefault(f"{pixels.shape[0]}x{pixels.shape[1]}", _Bucket())
            bucket.pending.append(pixels)
            bucket.captions.append(texts)
            if not any(texts):
                uncaptioned.append(i)
            if len(bucket.pending) * pixels[..., 0].size >= PIXELS_AT_ONCE:
                self._flush(bucket)
        for bucket in buckets.values():
            self._flush(bucket)
        write_part(
            path,
            {name: torch.cat(bucket.latents) for name, bucket in buckets.items()},
            {
                "captions": {name: bucket.captions for name, bucket in buckets.items()},
                "skipped": skipped,
                "uncaptioned": uncaptioned,
            },
        )

    def _flush(self, bucket: _Bucket) -> None:
        if bucket.pending:
            bucket.latents.append(self._encode(bucket.pending))
            bucket.pending.clear()

    def _read(self, position: int) -> Sample | Unreadable:
        try:
            pixels, texts = self.source.sample(position)
        except Unreadable as error:
            return error
        return self._fitted(pixels, position), texts

    def _fitted(self, pixels: np.ndarray, position: int) -> np.ndarray:
        multiple = self.autoencoder.spatial_compression_ratio
        pixels = fit_bucket(pixels, self.size, multiple)
        height, width = pixels.shape[:2]
        if height % multiple or width % multiple:
            raise ValueError(
                f"{self.source.name(position)} has {width}x{height} pixels, which the autoencoder cannot take: "
                f"set a size, a multiple of {multiple}, to crop to"
            )
        return pixels

    def _encode(self, arrays: Sequence[np.ndarray]) -> Tensor:
        device = self.autoencoder.device
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            latent = self.autoencoder.encode(to_tensor(arrays).to(device))
        return (latent.float() * self.autoencoder.config.scaling_factor).bfloat16().cpu()


def _shape(block: Tensor) -> _Shape:
    _, channels, height, width = block.shape
    return channels, height, width
