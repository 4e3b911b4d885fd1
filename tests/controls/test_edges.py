"""Canny and soft edges of a picture."""

from __future__ import annotations

import pytest
import torch

from sana_sprint.controls import canny, soft_edges
from tests.helpers.controls import SIDE, bar, disc, lines_of


def test_canny_draws_one_thin_closed_line_where_the_edge_is() -> None:
    edges = canny(disc())
    y, x = torch.nonzero(edges, as_tuple=True)
    radius = torch.hypot(y - 31.5, x - 31.5)
    assert float((radius - 20).abs().max()) < 1.5  # pixels: the edge is a staircase
    angles = torch.atan2(y - 31.5, x - 31.5).sort().values
    assert float(angles.diff().max()) < 0.15  # no gap: neighbours on this circle are 0.05 to 0.07 apart
    assert edges.sum() < 2 * 2 * torch.pi * 20  # thin


def test_canny_keeps_weak_edges_only_where_they_continue_strong_ones() -> None:
    fading = torch.zeros(SIDE, SIDE)
    fading[:, 32:] = torch.linspace(1, 0.08, SIDE)[:, None]  # its lower end is below the high threshold
    assert canny(fading)[:56].amax(dim=1).all()
    weak = torch.zeros(SIDE, SIDE)
    weak[:, 32:] = 0.2
    assert canny(fading)[50].any()
    assert not canny(weak * 0.8).any()
    assert not canny(torch.full((SIDE, SIDE), 0.5)).any()


def test_soft_edges_are_strongest_at_the_edge_and_fade_beside_it() -> None:
    found = soft_edges(disc(0.3))
    assert float(found.max()) == 1.0  # whatever the contrast
    assert float(found[31, 12]) > 0.9
    assert 0 < float(found[31, 14]) < float(found[31, 13])
    assert float(found[31, 31]) < 1e-6  # rounding of the blur's sums


@pytest.mark.parametrize("kind", ["canny", "softedge"])
def test_edges_of_a_picture_become_a_condition(kind: str) -> None:
    assert lines_of(bar(width=20), kind)[5:25].sum(dim=1).min() >= 2  # both sides of the stroke
