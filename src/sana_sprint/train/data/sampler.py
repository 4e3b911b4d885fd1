"""The sampling order, as a pure function of the position in the stream, so that a resumed run needs no state."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sana_sprint.train import distributed


def shuffled(indices: range, count: int, seed: int) -> Tensor:
    """Positions of a stream that runs through all `count` samples in a new order each epoch: (len(indices),)."""
    return torch.tensor([int(_order(count, seed * 7919 + i // count)[i % count]) for i in indices])


@functools.lru_cache(maxsize=128)  # an epoch's orders of all buckets
def _order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


class BucketOrder:
    """A stream in which every batch is of one bucket, so that its pictures have one shape.

    Every bucket is a stream of its own, `shuffled`, cut into batches: each of its samples is visited once before
    any is visited again, and batches go on over the border of its epochs, so that none is left out to make
    batches even. Buckets take turns in a random order, in proportion to their sizes: bucket b of size n_b has had
    floor((e n_b + offset_b) / batch_size) batches after e epochs, offset_b being random, so that even a bucket
    smaller than a batch gets its fair share and no more. With one bucket this is `shuffled` itself.

    Args:
        buckets: the samples of each bucket, a tensor of indices each.
        batch_size: samples of a batch.
        seed: of the orders.
    """

    def __init__(self, buckets: Sequence[Tensor], batch_size: int, seed: int) -> None:
        self.buckets, self.batch_size, self.seed = buckets, batch_size, seed
        self.sizes = torch.tensor([len(bucket) for bucket in buckets])
        generator = torch.Generator().manual_seed(seed)
        self.offsets = torch.randint(batch_size, (len(buckets),), generator=generator)

    def __call__(self, indices: range) -> Tensor:
        """The samples at these positions of the stream: (len(indices),).

        Raises:
            ValueError: the positions belong to several batches, or there are none.
        """
        batch = indices[0] // self.batch_size if indices else -1
        if batch < 0 or batch != indices[-1] // self.batch_size:
            raise ValueError(f"positions must be of one batch of {self.batch_size}; got {indices}")
        bucket, turn = self._turn(batch)
        shift = (turn - batch) * self.batch_size
        within = range(indices.start + shift, indices.stop + shift, indices.step)
        # Seeds of buckets are far apart: `shuffled` takes neighbouring ones for neighbouring epochs.
        return self.buckets[bucket][
            shuffled(within, len(self.buckets[bucket]), self.seed + 1_000_003 * bucket)
        ]

    def _turn(self, batch: int) -> tuple[int, int]:
        """(whose turn this batch of the stream is, how many turns that bucket has had before)"""
        total = int(self.sizes.sum())
        last = (
            batch + 1 + len(self.buckets)
        ) * self.batch_size // total + 1  # an epoch that comes after the batch
        epoch = (
            bisect.bisect_right(range(last + 1), batch, key=lambda e: int(self._turns_before(e).sum())) - 1
        )
        before = self._turns_before(epoch)
        turns = torch.repeat_interleave(
            self._turns_before(epoch + 1) - before
        )  # a bucket's number for each turn
        turns = turns[_order(len(turns), self.seed * 7919 + epoch)]
        place = batch - int(before.sum())
        bucket = int(turns[place])
        return bucket, int(before[bucket]) + int((turns[:place] == bucket).sum())

    def _turns_before(self, epoch: int) -> Tensor:
        return (epoch * self.sizes + self.offsets) // self.batch_size


@dataclass(frozen=True)
class Part:
    """One forward and backward pass worth of a step."""

    step: int  # optimisation step, from 0; all players' turns are counted together
    indices: range  # positions in the stream of samples


class Schedule(Protocol):
    """The fields of `config.ScheduleConfig` that divide a batch."""

    @property
    def batch_size(self) -> int: ...

    @property
    def accumulation(self) -> int: ...


def own_parts(step: int, schedule: Schedule) -> Iterator[tuple[int, Part]]:
    """This process's parts of a step, each with its number among all processes' parts.

    Part k of n takes samples k, k + n, k + 2n, ... of the step's batch, so what a step computes depends on n alone, not
    on how many processes share it.

    Raises:
        ValueError: the batch cannot be cut into equal parts.
    """
    batch_size, accumulation = schedule.batch_size, schedule.accumulation
    count = distributed.world_size() * accumulation
    if batch_size % count:
        raise ValueError(
            f"schedule.batch_size must be divisible by processes x schedule.accumulation = {count}; got {batch_size}"
        )
    for number in range(distributed.rank() * accumulation, (distributed.rank() + 1) * accumulation):
        yield number, Part(step, range(step * batch_size + number, (step + 1) * batch_size, count))
