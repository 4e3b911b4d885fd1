"""Seeds and noise: one generator per picture, on the CPU.

A picture is therefore the same made alone, in a batch, or on another device, up to rounding.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sana_sprint.precision import send

MAX_SEED = 2**64 - 1  # the largest that torch.Generator.manual_seed takes
RANDOM_SEED_BITS = 32  # of random seeds: short enough to be copied by hand


def image_seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """One seed per image: seed, seed+1, ... of one number, a list as it is, or random ones for None.

    Random seeds follow one another too, so that the first one alone repeats the whole call. The first is drawn from torch's
    global generator of the CPU, so `torch.manual_seed` makes it repeatable.

    Raises:
        ValueError: for a list of another length than `count` and for a seed outside 0 to 2**64 - 1.
    """
    if seed is None:
        seed = int(torch.randint(2**RANDOM_SEED_BITS, (), device="cpu"))
    if isinstance(seed, Sequence):
        if len(seed) != count:
            raise ValueError(f"seed must be one number or one per image, {count} here; got: {seed!r}")
        return [check_seed(value) for value in seed]
    first = check_seed(seed, count)
    return list(range(first, first + count))


def system_seed() -> int:
    """A seed from the operating system, for programs: torch's global generator is the same in every new process."""
    return int.from_bytes(os.urandom(RANDOM_SEED_BITS // 8))


def check_seed(seed: object, count: int = 1) -> int:
    """Returns `seed` as an int if it and the `count` - 1 numbers after it are seeds. Takes the same time for any count.

    Raises:
        ValueError: for anything but a whole number, and outside 0 to 2**64 - 1.
    """
    first = _whole(seed)
    for value in (first, first + count - 1):
        if not 0 <= value <= MAX_SEED:
            raise ValueError(f"a seed must be from 0 to 2**64 - 1 (None for a random one), got: {value}")
    return first


def _whole(seed: object) -> int:
    try:
        return operator.index(seed)  # type: ignore[arg-type]  # its TypeError is the check
    except TypeError:
        raise ValueError(f"a seed must be a whole number, got: {seed!r}") from None


def make_generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """A CPU generator per seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_noise(
    shape: Sequence[int],
    generators: torch.Generator | Sequence[torch.Generator] | None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Unit Gaussian noise (B,...) on `device`, drawn in `dtype` on the generators' device.

    A sequence gives each image its own stream. One generator draws the whole batch, as the published pipeline does;
    the pictures then depend on the batch size. None is torch's global generator of the CPU.

    Raises:
        ValueError: if the sequence has another length than the batch.
    """
    if generators is None or isinstance(generators, torch.Generator):
        return send(_randn(shape, generators, dtype), device)
    if len(generators) != shape[0]:
        raise ValueError(f"there must be one generator per image, {shape[0]} here; got: {len(generators)}")
    return torch.cat([send(_randn((1, *shape[1:]), generator, dtype), device) for generator in generators])


def _randn(shape: Sequence[int], generator: torch.Generator | None, dtype: torch.dtype) -> Tensor:
    device = "cpu" if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=device, dtype=dtype)
