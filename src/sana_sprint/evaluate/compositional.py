"""Scores a pipeline with a judge of whether pictures match their captions.

A judge is a module that offers `evaluation_scenes(count)`, scenes with a `caption` each; `judge_many(pictures, scenes)`,
verdicts with `correct` and `reason`; and `summarize(verdicts, scenes)`, the fraction that is correct, by task and "overall".
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from sana_sprint.images import grid
from sana_sprint.pipelines.text_to_image import SanaSprintPipeline
from sana_sprint.resolutions import pictures_at_once

SHEET_PICTURES, SHEET_COLUMNS = 96, 12
MAX_PICTURES_PER_CALL = 50


class Scene(Protocol):
    """The content that a picture should show."""

    @property
    def caption(self) -> str: ...


class Verdict(Protocol):
    """Whether a picture is right, and if not, why ("" if it is)."""

    @property
    def correct(self) -> bool: ...
    @property
    def reason(self) -> str: ...


class Judge(Protocol):
    """See the module's docstring."""

    def evaluation_scenes(self, count: int, /) -> Sequence[Scene]: ...
    def judge_many(self, pictures: Sequence[Image.Image], scenes: Sequence[Any], /) -> Sequence[Verdict]: ...
    def summarize(self, verdicts: Sequence[Any], scenes: Sequence[Any], /) -> dict[str, float]: ...


def import_judge(module: str) -> Judge:
    """The judge of a module's name. ValueError if it cannot be imported or lacks a function."""
    try:
        judge: Any = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"the judge {module} cannot be imported: {error}") from error
    missing = [name for name in ("evaluation_scenes", "judge_many", "summarize") if not hasattr(judge, name)]
    if missing:
        raise ValueError(f"{module} is no judge, it lacks: {', '.join(missing)}")
    found: Judge = judge
    return found


def draw(
    pipeline: SanaSprintPipeline,
    captions: Sequence[str],
    *,
    num_steps: int,
    guidance: float | None = None,
    middle_time: float | None = None,
    first_seed: int = 0,
    batch: int | None = None,
    on_progress: Callable[[int], None] = lambda count: None,
) -> list[Image.Image]:
    """One picture of the model's own size for each caption.

    Args:
        pipeline: of any model.
        captions: one per picture.
        num_steps: network evaluations.
        guidance: of every picture; None is the pipeline's own.
        middle_time: angle between the steps where there are two; None is the pipeline's own.
        first_seed: picture i has first_seed + i.
        batch: pictures per call of the pipeline; None chooses by their size.
        on_progress: called after each call of the pipeline with the number of its pictures.
    """
    batch = batch or pictures_at_once(pipeline.native_size**2, MAX_PICTURES_PER_CALL)
    asked = {"guidance_scale": guidance, "intermediate_timesteps": middle_time}
    settings: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    pictures: list[Image.Image] = []
    for start in range(0, len(captions), batch):
        part = list(captions[start : start + batch])
        seeds = list(range(first_seed + start, first_seed + start + len(part)))
        output: Any = pipeline(part, num_inference_steps=num_steps, seed=seeds, **settings)
        pictures += output.images
        on_progress(len(part))
    return pictures


def score(
    judge: Judge,
    pictures: Sequence[Image.Image],
    scenes: Sequence[Scene],
    *,
    name: str,
    folder: Path | None = None,
) -> dict[str, float]:
    """The judge's summary; into `folder` go a sheet of the first pictures, <name>.png, and all verdicts, <name>.tsv."""
    verdicts = judge.judge_many(pictures, scenes)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        grid(pictures[:SHEET_PICTURES], columns=SHEET_COLUMNS).save(folder / f"{name}.png")
        lines = [
            f"{v.correct}\t{scene.caption}\t{v.reason}" for v, scene in zip(verdicts, scenes, strict=True)
        ]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return judge.summarize(verdicts, scenes)


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Summaries by name, at least one, as a Markdown table: the overall score first, in percent."""
    keys = ["overall", *(key for key in next(iter(rows.values())) if key != "overall")]
    lines = [f"| model | {' | '.join(keys)} |", "|---" * (len(keys) + 1) + "|"]
    lines += [
        f"| {name} | {' | '.join(f'{scores[key]:.1%}' for key in keys)} |" for name, scores in rows.items()
    ]
    return "\n".join(lines)
