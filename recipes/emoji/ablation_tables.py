"""Writes the tables of docs/ablations.md from the students' scores, each with the paper's numbers beside ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from recipes.emoji.plots import draw_curves

START = "the teacher itself"
BASELINE, CONSISTENCY, ADVERSARIAL = "both losses", "consistency loss only", "adversarial loss only"
GUIDANCE, LOW_GUIDANCE = 4.5, 2.0
PLOT = "images/ablated-students.png"
# The page above this mark is written by hand.
MARK = "<!-- Below: python -m recipes.emoji.ablations -->\n"
HEADINGS = {
    "judge1": "judge, 1 step",
    "judge2": "judge, 2 steps",
    "fid1": "FID, 1 step",
    "fid2": "FID, 2 steps",
    "grad_norm": "gradient norm",
    "judge2_low": f"judge, guidance {LOW_GUIDANCE}",
    "fid2_low": f"FID, guidance {LOW_GUIDANCE}",
}
COLUMNS = ("judge1", "judge2", "fid1", "fid2", "grad_norm")


@dataclass(frozen=True)
class Table:
    """One ablation: its title and, for each variant, the FID and CLIP score at two steps that the paper reports.

    `columns` are the scores shown; `below` is Markdown printed below the table.
    """

    title: str
    rows: Mapping[str, str]
    columns: tuple[str, ...] = COLUMNS
    below: str = ""


TABLES = (
    Table(
        "Losses (Table 3)",
        {
            START: "",
            CONSISTENCY: "8.93 / 27.51",
            ADVERSARIAL: "12.20 / 27.00",
            BASELINE: "8.11 / 28.02",
        },
        below=f"![The student's gradient norm by its own steps]({PLOT})",
    ),
    Table(
        "Guidance embedding (Table 4)",
        {"one guidance scale": "9.23 / 27.15 (no embedding)", BASELINE: "8.72 / 28.09"},
        columns=(*COLUMNS, "judge2_low", "fid2_low"),
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
)


def document(
    results: Mapping[str, Sequence[Mapping[str, Any]]], *, steps: int, batch_size: int, count: int
) -> str:
    """The Markdown below the mark. Each entry is the mean over seeds, and behind it half of their range."""
    parts = [
        "## How to read the tables",
        "",
        f"The embedded model's world. Each run starts from the first of the teachers at the end of this page, and has {steps}",
        f"steps of {batch_size} pictures, both players counted. {count} held-out prompts, guidance {GUIDANCE}. Two steps go from pi/2",
        "by way of 1.0, as in the paper's ablations. The judge says which part of the",
        "pictures is right; FID is the Frechet distance to real renders in the embedded autoencoder's features, which compares with",
        "itself only. Entries are means over seeds ± half of their range; the paper's are FID / CLIP score on MJHQ-30K.",
    ]
    for table in TABLES:
        headings = " | ".join(HEADINGS[key] for key in table.columns)
        parts += ["", f"### {table.title}", "", f"| variant | {headings} | paper |"]
        parts.append("|---" * (len(table.columns) + 2) + "|")
        for name, paper in table.rows.items():
            found = results[name]
            entries = (entry([each[key] for each in found], key) for key in table.columns)
            parts.append(f"| {name} | {' | '.join(entries)} | {paper} |")
        parts += ["", table.below] if table.below else []
    return "\n".join(parts) + "\n"


def plot(results: Mapping[str, Sequence[Mapping[str, Any]]], folder: Path) -> None:
    """The student's gradient norm in the first seed's runs with one loss or both, into the page's folder."""
    curves = {name: results[name][0]["curves"]["grad_norm"] for name in (BASELINE, CONSISTENCY, ADVERSARIAL)}
    draw_curves({"the student's gradient norm, by its own steps": curves}, folder / PLOT)


def write(page: Path, tables: str) -> None:
    """Replaces the page's text below the mark."""
    before = page.read_text(encoding="utf-8").partition(MARK)[0]
    page.write_text(f"{before}{MARK}\n{tables}", encoding="utf-8")


def entry(values: Sequence[float], key: str) -> str:
    """ "61.5% ± 0.8", "3.20 ± 0.11"."""
    is_share = key.startswith("judge")
    center = f"{100 * mean(values):.1f}%" if is_share else f"{mean(values):.3g}"
    if len(values) == 1:
        return center
    spread = (max(values) - min(values)) / 2
    return f"{center} ± {100 * spread:.1f}" if is_share else f"{center} ± {spread:.2g}"
