"""The paper's ablations in small: `python -m recipes.emoji.ablations` trains every variant and writes docs/ablations.md.

Every variant is recipes/emoji/student.toml with a few values changed. All have as many steps of the student, and several
seeds; those of `ablated_teachers` are teachers. Finished runs are kept in the output folder, and a run that was stopped
continues, so the command can be stopped and given again. Scores are of one step and, as in the paper's ablations, of two steps from pi/2 by way of 1.0.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from recipes.emoji import ablated_teachers
from recipes.emoji.ablation_runs import kept, letters, log_of, to_toml
from recipes.emoji.ablation_tables import BASELINE, document

RECIPE = Path(__file__).with_name("student.toml")
MATCHING = RECIPE.with_name("student-matching.toml")
DOCUMENT = Path("docs/ablations.md")
GUIDANCE = 4.5
MIDDLE_TIME = 1.0  # of the paper's ablations

Values = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How much is trained: steps of each student (both players counted) and of each teacher."""

    steps: int
    teacher_steps: int


# On two cores that do nothing else, a student's step takes 1.6 s and a teacher's 1.4 s (docs/log.md). With two seeds that
# is 1 h 25 and 40 minutes at "small", and scoring another 40: under 3 hours in all; twice that at "full".
SCALES = {"small": Scale(steps=200, teacher_steps=200), "full": Scale(steps=400, teacher_steps=400)}


@dataclass(frozen=True)
class Variant:
    """A run that differs from the recipe by what `change` does to its values."""

    name: str
    change: Callable[[Values], object]


def _without_discriminator(values: Values) -> None:
    """With as many steps of the student: beside a discriminator only every other step is the student's."""
    del values["discriminator"]
    _lengthen(values, 1, 2)


def _with_matching(values: Values) -> None:
    """The third player's steps come on top."""
    values["matching"] = tomllib.loads(MATCHING.read_text(encoding="utf-8"))["matching"]
    _lengthen(values, 3, 2)


def _matching_for_discriminator(values: Values) -> None:
    _with_matching(values)
    del values["discriminator"]
    _lengthen(values, 2, 3)


def _lengthen(values: Values, times: int, parts: int) -> None:
    values["schedule"]["steps"] = values["schedule"]["steps"] * times // parts
    values["tangent_warmup_steps"] = values["tangent_warmup_steps"] * times // parts


def _weigh(values: Values, factor: float) -> None:
    values["discriminator"]["weight"] *= factor


VARIANTS = (
    Variant(BASELINE, lambda values: None),
    Variant("consistency loss only", _without_discriminator),
    Variant("adversarial loss only", lambda values: values.update(scm_weight=0.0)),
    Variant("one guidance scale", lambda values: values.update(guidance_scales=[GUIDANCE])),
    Variant("twice the weight", lambda values: _weigh(values, 2.0)),
    Variant("a fifth of the weight", lambda values: _weigh(values, 0.2)),
    Variant("with matching", _with_matching),
    Variant("matching for the adversarial loss", _matching_for_discriminator),
    Variant("max-time 0%", lambda values: values.update(max_time_rate=0.0)),
    Variant("max-time 70%", lambda values: values.update(max_time_rate=0.7)),
)


def main() -> None:
    """Trains and scores what is missing, then writes the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, default=Path("runs/emoji/refine/final"))
    parser.add_argument("--output", type=Path, default=Path("runs/emoji/ablations"))
    parser.add_argument("--scale", choices=SCALES, default="full", help="small: half the steps")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--count", type=int, default=600, help="number of held-out prompts, a multiple of 6 above 512"
    )
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    scale = SCALES[arguments.scale]
    results: dict[str, list[Values]] = {}
    for seed in range(arguments.seeds):
        for variant in VARIANTS:
            scores = result(variant, seed, arguments, scale.steps)
            results.setdefault(variant.name, []).append(scores)
            print(f"{variant.name}, seed {seed}: {scores}", flush=True)
    teachers = ablated_teachers.results(
        arguments.teacher.resolve(),
        arguments.output,
        scale.teacher_steps,
        arguments.seeds,
        train=partial(train, processes=arguments.processes),
    )
    page = document(results, steps=scale.steps, count=arguments.count)
    DOCUMENT.write_text(page + ablated_teachers.section(teachers, scale.teacher_steps), encoding="utf-8")
    ablated_teachers.plot(teachers, DOCUMENT.parent / ablated_teachers.PLOT)
    print(DOCUMENT)


def run_values(variant: Variant, seed: int, teacher: Path, output: Path, steps: int) -> Values:
    """What the variant's stage file says."""
    values = copy.deepcopy(tomllib.loads(RECIPE.read_text(encoding="utf-8")))
    values.update(stage="student", seed=seed, teacher=str(teacher), output=str(output))
    values["tangent_warmup_steps"] = min(values["tangent_warmup_steps"], steps // 4)
    values["schedule"].update(steps=steps, sample_every=steps, save_every=max(1, steps // 4))
    variant.change(values)
    return values


def result(variant: Variant, seed: int, arguments: argparse.Namespace, steps: int) -> Values:
    """The variant's scores: from disk, or by training and scoring it."""
    base = arguments.output / f"{letters(variant.name)}-{seed}"
    values = run_values(variant, seed, arguments.teacher.resolve(), base, steps)
    return kept(
        values,
        partial(train, processes=arguments.processes),
        lambda folder: _score(folder, arguments.count),
    )


def train(values: Values, folder: Path, processes: int) -> None:
    """Trains in other processes, from where a stopped run was."""
    folder.mkdir(parents=True, exist_ok=True)
    stage = folder / "stage.toml"
    stage.write_text(to_toml(values), encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    subprocess.run([sys.executable, *launch, "-m", "sana_sprint", "train", str(stage)], check=True)


def _score(folder: Path, count: int) -> Values:
    """The judge's overall score and the Frechet distance at one and two steps; the gradient's median size in training."""
    import numpy as np
    import torch

    from recipes.emoji.evaluate import fid
    from recipes.emoji.judge import evaluation_scenes, judge_many, summarize
    from recipes.emoji.scenes import render, sample_scene
    from sana_sprint import SanaSprintPipeline
    from sana_sprint.evaluate.compositional import draw

    pipeline = SanaSprintPipeline.from_pretrained(folder / "final", torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    scenes = evaluation_scenes(count)
    scores: Values = {}
    drawn = {}
    captions = [scene.caption for scene in scenes]
    for steps, middle_time in ((1, None), (2, MIDDLE_TIME)):
        pictures = draw(pipeline, captions, num_steps=steps, guidance=GUIDANCE, middle_time=middle_time)
        scores[f"judge{steps}"] = summarize(judge_many(pictures, scenes), scenes)["overall"]
        drawn[f"fid{steps}"] = pictures
    scores |= fid(pipeline.vae, drawn, [render(sample_scene(i)) for i in range(4 * count)])
    scores["grad_norm"] = float(np.median([norm for _, norm in log_of(folder, "grad_norm")]))
    return scores


if __name__ == "__main__":
    main()
