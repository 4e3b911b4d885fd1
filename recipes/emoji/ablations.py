"""Repeats the paper's ablations at small scale: `python -m recipes.emoji.ablations` trains every variant and writes docs/ablations.md.

Every variant is recipes/emoji/student.toml with a few values changed, with the same number of student updates and several
seeds. All start from the first of `ablated_teachers`, which are trained from scratch on an autoencoder's latents. Finished runs
are kept in the output folder and interrupted ones resume, so the command can be stopped and repeated. Scores are for one
step and, as in the paper's ablations, for two steps with the middle time 1.0.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import tomllib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median

from recipes.emoji import ablated_teachers
from recipes.emoji.ablation_runs import Run, Train, Values, folder_of, kept, letters, log_of, run_all, train
from recipes.emoji.ablation_tables import (
    ADVERSARIAL,
    BASELINE,
    CONSISTENCY,
    GUIDANCE,
    LOW_GUIDANCE,
    START,
    document,
    plot,
    write,
)

RECIPE = Path(__file__).with_name("student.toml")
DOCUMENT = Path("docs/ablations.md")
MIDDLE_TIME = 1.0  # of the paper's ablations
SHEET, SHEET_COLUMNS = 48, 12  # sample pictures kept of each run


def _without_discriminator(values: Values) -> None:
    """Halves the run's length: without a discriminator every step is a student update instead of every other one."""
    del values["discriminator"]
    values["schedule"]["steps"] //= 2
    values["tangent_warmup_steps"] //= 2


def _weigh(values: Values, factor: float) -> None:
    values["discriminator"]["weight"] *= factor


# name -> change of the recipe's values
VARIANTS: Mapping[str, Callable[[Values], object]] = {
    # One update at the start of the warm-up: the score of the initial weights.
    START: lambda values: values["schedule"].update(steps=2),
    BASELINE: lambda values: None,
    CONSISTENCY: _without_discriminator,
    ADVERSARIAL: lambda values: values.update(scm_weight=0.0),
    "one guidance scale": lambda values: values.update(guidance_scales=[GUIDANCE]),
    "twice the weight": lambda values: _weigh(values, 2.0),
    "a fifth of the weight": lambda values: _weigh(values, 0.2),
    "max-time 0%": lambda values: values.update(max_time_rate=0.0),
    "max-time 70%": lambda values: values.update(max_time_rate=0.7),
}
HALVES: Mapping[str, Mapping[str, object]] = {"teachers": ablated_teachers.VARIANTS, "students": VARIANTS}


def main() -> None:
    """Trains and scores the missing runs, then writes the document."""
    arguments = _arguments()
    if arguments.parallel > 1:
        # Inherited by the pool's processes and their children.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        _encode_all(arguments)
    score = partial(result, arguments=arguments)
    seeds = range(arguments.seeds)
    teachers, students = ([Run(name, seed) for seed in seeds for name in names] for names in HALVES.values())
    found: dict[Run, Values] = {}
    if arguments.only != "students":
        found |= run_all(teachers, arguments.parallel, score)
    if arguments.only != "teachers":
        found |= run_all(students, arguments.parallel, score)
    if arguments.only:
        return
    taught, learned = (
        {name: [found[Run(name, seed)] for seed in seeds] for name in names} for names in HALVES.values()
    )
    page = document(learned, steps=arguments.steps, batch_size=arguments.batch_size, count=arguments.count)
    page += ablated_teachers.section(taught, arguments.teacher_steps)
    write(DOCUMENT, page)
    plot(learned, DOCUMENT.parent)
    ablated_teachers.plot(taught, DOCUMENT.parent / ablated_teachers.PLOT)
    print(DOCUMENT)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    # The path as given is the same on every machine, and so are the folder names, which depend on it.
    add("--autoencoder", type=Path, default=Path("src/sana_sprint/embedded/emoji/vae"))
    add("--output", type=Path, default=Path("runs/emoji/ablations"))
    add("--steps", type=int, default=800, help="of each student, both players counted")
    add("--batch-size", type=int, default=64, help="of students")
    add("--teacher-steps", type=int, default=1200)
    add("--teacher-batch-size", type=int, default=192)
    add("--seeds", type=int, default=2, help="number of runs of each variant")
    add("--count", type=int, default=516, help="of held-out prompts, a multiple of 6 above 512")
    add(
        "--parallel",
        type=int,
        default=1,
        help="number of runs at a time; they may share a GPU, with --processes 1",
    )
    add("--processes", type=int, default=2, help="that train a run; with GPUs, one for each")
    add("--only", choices=HALVES, help="train and score this half, on this machine, and write no document")
    return parser.parse_args()


def result(run: Run, arguments: argparse.Namespace) -> Values:
    """Returns the run's scores, from disk or by training and scoring it."""
    fit = partial(train, processes=arguments.processes, is_logged=arguments.parallel > 1)
    if run.name in VARIANTS:
        values = run_values(run, _taught(arguments, fit), arguments)
        scores = kept(values, fit, partial(_score, count=arguments.count))
    else:
        scores = kept(_teacher_values(run, arguments), fit, ablated_teachers.score)
    print(f"{run}: { {key: value for key, value in scores.items() if key != 'curves'} }", flush=True)
    return scores


def _taught(arguments: argparse.Namespace, fit: Train) -> Path:
    """Returns the folder of the students' teacher, training it if it is missing."""
    values = _teacher_values(Run(ablated_teachers.BASELINE, 0), arguments)
    folder = folder_of(values)
    if not (folder / "final").is_dir():
        fit({**values, "output": str(folder)}, folder)
    return folder / "final"


def _teacher_values(run: Run, arguments: argparse.Namespace) -> Values:
    return ablated_teachers.run_values(
        *run, arguments.autoencoder, arguments.output, arguments.teacher_steps, arguments.teacher_batch_size
    )


def run_values(run: Run, teacher: Path, arguments: argparse.Namespace) -> Values:
    """Returns the variant's stage file as nested values."""
    values = copy.deepcopy(tomllib.loads(RECIPE.read_text(encoding="utf-8")))
    output = arguments.output / f"{letters(run.name)}-{run.seed}"
    values.update(stage="student", seed=run.seed, teacher=str(teacher), output=str(output))
    steps = arguments.steps
    values["tangent_warmup_steps"] = min(values["tangent_warmup_steps"], steps // 4)
    values["schedule"].update(
        steps=steps, batch_size=arguments.batch_size, sample_every=steps, save_every=max(1, steps // 4)
    )
    VARIANTS[run.name](values)
    return values


def _encode_all(arguments: argparse.Namespace) -> None:
    """Fills the latent cache shared by all runs; parallel runs on an empty cache would each encode everything."""
    from sana_sprint.train.cache.files import PART_SIZE

    data = tomllib.loads(RECIPE.read_text(encoding="utf-8"))["data"]
    count = data["num_samples"]
    # Whole parts, because each part is a file.
    share = -(-count // (PART_SIZE * arguments.parallel)) * PART_SIZE
    shares = [range(start, min(start + share, count)) for start in range(0, count, share)]
    encode = partial(
        _encode, source=data["source"], autoencoder=arguments.autoencoder, output=arguments.output
    )
    run_all(shares, arguments.parallel, encode)


def _encode(samples: range, *, source: str, autoencoder: Path, output: Path) -> None:
    import torch

    from sana_sprint import backends
    from sana_sprint.models.autoencoder import AutoencoderDC
    from sana_sprint.train.cache.latents import cached_latents
    from sana_sprint.train.data.source import FunctionSource
    from sana_sprint.train.distributed import device
    from sana_sprint.weights import load_model

    part = FunctionSource(source)
    part.training = samples
    vae = backends.apply(load_model(AutoencoderDC, autoencoder, dtype=torch.float32, device=device()))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # its progress bar
        cached_latents(output, part, len(samples), vae, report=lambda line: None)


def _score(folder: Path, count: int) -> Values:
    """Computes the judge's overall score and the Frechet distance at one and two steps and at two with low guidance,
    the median gradient norm in training, and its curve over the student's updates.
    """
    import torch

    from recipes.emoji.evaluate import fid
    from recipes.emoji.judge import evaluation_scenes, judge_many, summarize
    from recipes.emoji.scenes import render, sample_scene
    from sana_sprint import SanaSprintPipeline
    from sana_sprint.evaluate.compositional import draw
    from sana_sprint.images import grid
    from sana_sprint.train.config import load_config
    from sana_sprint.train.distributed import device

    pipeline = SanaSprintPipeline.from_pretrained(
        folder / "final", torch_dtype=torch.bfloat16, device_map=device()
    )
    pipeline.set_progress_bar_config(disable=True)
    scenes = evaluation_scenes(count)
    captions = [scene.caption for scene in scenes]
    ways = {
        "1": (1, GUIDANCE, None),
        "2": (2, GUIDANCE, MIDDLE_TIME),
        "2_low": (2, LOW_GUIDANCE, MIDDLE_TIME),
    }
    drawn = {
        way: draw(pipeline, captions, num_steps=steps, guidance=guidance, middle_time=middle_time)
        for way, (steps, guidance, middle_time) in ways.items()
    }
    grid(drawn["1"][:SHEET], columns=SHEET_COLUMNS).save(folder / "pictures.png")
    verdicts = {way: judge_many(pictures, scenes) for way, pictures in drawn.items()}
    scores: Values = {f"judge{way}": summarize(found, scenes)["overall"] for way, found in verdicts.items()}
    distances = fid(pipeline.vae, drawn, [render(sample_scene(i)) for i in range(4 * count)])
    scores |= {f"fid{way}": distance for way, distance in distances.items()}
    players = len(load_config(folder / "stage.toml").optimizers)
    norms = log_of(folder, "grad_norm")
    scores["grad_norm"] = median(norm for _, norm in norms)
    scores["curves"] = {"grad_norm": [(step / players, norm) for step, norm in norms]}
    return scores


if __name__ == "__main__":
    main()
