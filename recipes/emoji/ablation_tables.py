"""docs/ablations.md from the ablations' scores: a table for each of the paper's, its numbers beside ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

BASELINE = "both losses"


@dataclass(frozen=True)
class Table:
    """A question, and for each answer what the paper measured: FID and CLIP score at two steps."""

    title: str
    rows: Mapping[str, str]


TABLES = (
    Table(
        "Losses (Table 3)",
        {
            "consistency loss only": "8.93 / 27.51",
            "adversarial loss only": "12.20 / 27.00",
            BASELINE: "8.11 / 28.02",
        },
    ),
    Table(
        "Guidance embedding (Table 4)",
        {"one guidance scale": "9.23 / 27.15 (no embedding)", BASELINE: "8.72 / 28.09"},
    ),
    Table(
        "Consistency : adversarial weight (Table 5)",
        {
            "twice the weight": "8.81 / 27.93 (1 : 1)",
            BASELINE: "8.43 / 27.85 (1 : 0.5)",
            "a fifth of the weight": "8.90 / 27.76 (1 : 0.1)",
        },
    ),
    Table(
        "Max-time weighting (Table 6)",
        {"max-time 0%": "9.44 / 27.65", BASELINE: "8.32 / 27.94 (50%)", "max-time 70%": "8.11 / 28.02"},
    ),
    Table(
        "Distribution matching (not the paper's)",
        {BASELINE: "", "with matching": "", "matching for the adversarial loss": ""},
    ),
)
COLUMNS = {
    "judge1": "judge, 1 step",
    "judge2": "judge, 2 steps",
    "fid1": "FID, 1 step",
    "fid2": "FID, 2 steps",
    "grad_norm": "gradient norm",
}


def document(results: Mapping[str, Sequence[Mapping[str, Any]]], *, steps: int, count: int) -> str:
    """The Markdown page. Each entry is the mean over seeds, and behind it half of their range."""
    parts = [
        "# The paper's ablations in small",
        "",
        f"The embedded model's world: {steps} steps of each run, both players counted, {count} held-out prompts, guidance",
        "4.5. Two steps go from pi/2 by way of 1.0, as in the paper's ablations. The judge says which part of the pictures is",
        "right; FID is the Frechet distance to real renders in the embedded autoencoder's features, which compares with",
        "itself only. Entries are means over seeds ± half of their range; the paper's are FID / CLIP score on MJHQ-30K.",
        "Made by `python -m recipes.emoji.ablations`.",
    ]
    for table in TABLES:
        parts += ["", f"## {table.title}", "", f"| variant | {' | '.join(COLUMNS.values())} | paper |"]
        parts.append("|---" * (len(COLUMNS) + 2) + "|")
        for name, paper in table.rows.items():
            entries = (entry([scores[key] for scores in results[name]], key) for key in COLUMNS)
            parts.append(f"| {name} | {' | '.join(entries)} | {paper} |")
    return "\n".join(parts) + "\n"


def entry(values: Sequence[float], key: str) -> str:
    """ "61.5% ± 0.8", "3.20 ± 0.11"."""
    spread = (max(values) - min(values)) / 2
    if key.startswith("judge"):
        return f"{100 * mean(values):.1f}% ± {100 * spread:.1f}"
    return f"{mean(values):.3g} ± {spread:.2g}"
