"""Widening and thinning lines."""

from __future__ import annotations

import itertools

import pytest
import torch

from sana_sprint.controls import dilate, erode


def test_dilation_and_erosion_are_each_others_mirror() -> None:
    dot = torch.zeros(9, 9)
    dot[4, 4] = 1
    assert [int(dilate(dot, size).sum()) for size in (0, 1, 2, 3, 4)] == [1, 1, 4, 9, 16]
    assert torch.equal(erode(dilate(dot, 3), 3), dot)


@pytest.mark.parametrize("size", [2, 3, 4, 7, 24])
@pytest.mark.parametrize("shape", [(31, 40), (5, 64), (1, 1)])
def test_dilation_is_the_largest_value_of_each_square(size: int, shape: tuple[int, int]) -> None:
    picture = torch.randn(shape, generator=torch.Generator().manual_seed(size))
    before = (size - 1) // 2
    for y, x in itertools.product(range(shape[0]), range(shape[1])):
        rows = slice(max(0, y - before), y + size - before)
        square = picture[rows, max(0, x - before) : x + size - before]
        assert dilate(picture, size)[y, x] == square.max()
