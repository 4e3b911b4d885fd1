"""How much pictures differ in what their captions leave open, as entropies in bits.

A model that draws the same background whenever none is named passes a judge; this number shows it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

from recipes.emoji3d.judge import Verdict
from recipes.emoji3d.samples import Prompt

_CELLS = 4  # of a side, into which places are counted


def variety(verdicts: Sequence[Verdict], prompts: Sequence[Prompt]) -> dict[str, float]:
    """The entropy of open backgrounds (first colour and pattern), styles and places (of single things, in 4 x 4 cells).

    A few hundred pictures underestimate it: compare equal numbers only. 0 where no caption leaves it open.
    """
    backgrounds, styles, places = list[Hashable](), list[Hashable](), list[Hashable]()
    for verdict, prompt in zip(verdicts, prompts, strict=True):
        if not prompt.says.names_background:
            backgrounds.append((verdict.background.first, verdict.background.pattern))
        if not prompt.says.names_style:
            styles.append(verdict.style)
        if len(prompt.scene.things) == 1 and prompt.scene.relation is None and verdict.places:
            places.append((int(verdict.places[0].x * _CELLS), int(verdict.places[0].y * _CELLS)))
    return {"background": entropy(backgrounds), "style": entropy(styles), "place": entropy(places)}


def entropy(values: Iterable[Hashable]) -> float:
    """Of the values' frequencies, in bits; 0 for no values."""
    counts = Counter(values)
    total = sum(counts.values())
    return sum(count / total * math.log2(total / count) for count in counts.values())
