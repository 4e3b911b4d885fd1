"""The order of training: every sample equally often, batches of one shape, the same wherever one starts."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sana_sprint.train.data.sampler import BucketOrder, shuffled


def test_shuffling_visits_every_sample_once_an_epoch() -> None:
    order = shuffled(range(20), 10, seed=3).tolist()
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
    assert shuffled(range(7, 12), 10, seed=3).tolist() == order[7:12]
    assert shuffled(range(20), 10, seed=4).tolist() != order


def buckets_of(sizes: list[int]) -> list[torch.Tensor]:
    return list(torch.arange(sum(sizes)).split(sizes))


def batches(sizes: list[int], batch_size: int, count: int, seed: int = 0) -> list[list[int]]:
    order = BucketOrder(buckets_of(sizes), batch_size, seed)
    return [order(range(i * batch_size, (i + 1) * batch_size)).tolist() for i in range(count)]


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    batch_size=st.integers(1, 8),
    seed=st.integers(0, 3),
)
def test_no_sample_is_lost_or_ahead_of_the_others(sizes: list[int], batch_size: int, seed: int) -> None:
    epochs, total = 12, sum(sizes)
    stream = batches(sizes, batch_size, epochs * total // batch_size, seed)
    for bucket in map(set, (bucket.tolist() for bucket in buckets_of(sizes))):
        visits = Counter({sample: 0 for sample in bucket})
        visits.update(sample for batch in stream if set(batch) <= bucket for sample in batch)
        # Once each before any is visited again.
        assert max(visits.values()) - min(visits.values()) <= 1
    assert sum(map(len, stream)) == len(stream) * batch_size
    assert all(any(set(batch) <= set(bucket.tolist()) for bucket in buckets_of(sizes)) for batch in stream)


@pytest.mark.parametrize("seed", range(4))
def test_a_bucket_smaller_than_a_batch_gets_its_fair_share(seed: int) -> None:
    epochs, batch_size = 80, 8
    stream = batches([97, 3], batch_size, epochs * 100 // batch_size, seed)
    rare = sum(len(batch) for batch in stream if batch[0] >= 97)
    # Off by less than a batch at the start and one at the end, and by one epoch, the last, which has no end here.
    assert abs(rare - epochs * 3) <= 2 * batch_size + 3


def test_one_bucket_is_plain_shuffling() -> None:
    stream = [sample for batch in batches([10], 4, 10, seed=3) for sample in batch]
    assert stream == shuffled(range(40), 10, seed=3).tolist()


def test_parts_and_late_starts_see_the_same_batch() -> None:
    """The property that makes two processes equal one, and a resumed run equal an uninterrupted one."""
    sizes, size = [7, 5, 2], 4
    whole = batches(sizes, size, 30)
    late = BucketOrder(buckets_of(sizes), size, 0)
    for step in (29, 3):
        parts = [late(range(step * size + k, (step + 1) * size, 2)).tolist() for k in range(2)]
        assert parts == [whole[step][0::2], whole[step][1::2]]


def test_buckets_take_turns_at_random() -> None:
    stream = batches([40, 40], 4, 20)
    turns = [batch[0] < 40 for batch in stream]
    assert sum(turns) == 10
    assert turns not in ([True] * 10 + [False] * 10, [False] * 10 + [True] * 10, [True, False] * 10)
    assert [batch[0] < 40 for batch in batches([40, 40], 4, 20, seed=1)] != turns


@pytest.mark.parametrize("indices", [range(0), range(6, 10), range(-1, 3)])
def test_positions_of_several_batches_are_refused(indices: range) -> None:
    with pytest.raises(ValueError, match="one batch of 4"):
        BucketOrder(buckets_of([8]), 4, 0)(indices)
