"""Compares teachers with and without dense time and QK norm (section 3.2 of the paper): learning curves and tangents.

The paper shows the student's gradients. The quantity that explodes is dF/dt, a property of the teacher that the student
starts from, so it is measured here on the teacher.
"""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from recipes.emoji.ablation_runs import Values, letters, log_of
from recipes.emoji.ablation_tables import entry
from recipes.emoji.plots import draw_curves

RECIPE = Path(__file__).with_name("teacher.toml")
PLOT = "images/ablated-teachers.png"
NUM_MEASURED = 126  # pictures whose tangents are measured
NUM_JUDGED = 300
GUIDANCE, STEPS = 4.5, 20
BASELINE = "dense time, QK norm"
# name -> what its [model] says instead of the recipe's
VARIANTS: Mapping[str, Values] = {
    BASELINE: {},
    "time in thousandths": {"timestep_scale": 1.0},
    "no QK norm": {"qk_norm": None},
    "neither": {"timestep_scale": 1.0, "qk_norm": None},
}
COLUMNS = {
    "judge": f"judge, {STEPS} guided steps",
    "loss": "loss",
    "grad_norm": "gradient norm",
    "grad_norm_max": "its greatest",
    "tangent": "tangent",
    "tangent_max": "its greatest",
}


def run_values(name: str, seed: int, autoencoder: Path, output: Path, steps: int, batch_size: int) -> Values:
    """Returns the variant's stage file as nested values."""
    values = copy.deepcopy(tomllib.loads(RECIPE.read_text(encoding="utf-8")))
    values.update(
        seed=seed, autoencoder=str(autoencoder), output=str(output / f"teacher-{letters(name)}-{seed}")
    )
    values["schedule"].update(
        steps=steps,
        batch_size=batch_size,
        sample_every=steps,
        save_every=max(1, steps // 4),
        log_every=max(1, steps // 50),
    )
    model = {**values["model"], **VARIANTS[name]}
    values["model"] = {key: value for key, value in model.items() if value is not None}
    return values


def score(folder: Path) -> Values:
    """Scores a finished run: curves, their summary, tangents and the share of correct pictures."""
    from recipes.emoji.evaluate import teacher_pictures
    from recipes.emoji.judge import evaluation_scenes, judge_many, summarize

    scenes = evaluation_scenes(NUM_JUDGED)
    pictures = teacher_pictures(folder / "final", scenes, GUIDANCE, STEPS)
    curves = {name: log_of(folder, name) for name in ("loss", "grad_norm")}
    norms = [norm for _, norm in curves["grad_norm"]]
    losses = [loss for _, loss in curves["loss"]]
    tangents = tangent_sizes(folder / "final", NUM_MEASURED)
    return {
        "judge": summarize(judge_many(pictures, scenes), scenes)["overall"],
        "loss": mean(losses[-len(losses) // 4 :]),
        "grad_norm": median(norms),
        "grad_norm_max": max(norms),
        "tangent": median(tangents),
        "tangent_max": max(tangents),
        "curves": curves,
    }


def tangent_sizes(folder: Path, count: int) -> list[float]:
    """Root mean squares of cos(t) sin(t) dF/dt along the model's own trajectories, at one time for each held-out picture."""
    import torch

    from recipes.emoji.judge import evaluation_scenes
    from recipes.emoji.scenes import render
    from sana_sprint import backends
    from sana_sprint.backends.prompt_cache import CachedPromptEncoder
    from sana_sprint.models.autoencoder import AutoencoderDC
    from sana_sprint.models.text_encoder import load_text_encoder, load_tokenizer
    from sana_sprint.models.transformer import SanaTransformer2DModel
    from sana_sprint.train.data.pictures import to_tensor
    from sana_sprint.train.distributed import device
    from sana_sprint.train.losses.tangent import make_tangent
    from sana_sprint.train.models.base import velocity_of
    from sana_sprint.trigflow import add_noise, flow_denoiser, lognormal_times
    from sana_sprint.weights import load_model

    place = device()
    vae = backends.apply(load_model(AutoencoderDC, folder / "vae", dtype=torch.float32, device=place))
    model = backends.apply(
        load_model(SanaTransformer2DModel, folder / "transformer", dtype=torch.float32, device=place)
    )
    text_encoder = load_text_encoder(folder / "text_encoder", device=place)
    encoder = CachedPromptEncoder(load_tokenizer(folder / "tokenizer"), text_encoder)
    scenes = evaluation_scenes(count)
    torch.manual_seed(0)
    times = lognormal_times(count, mean=0.2, std=1.6)
    sizes: list[float] = []
    with torch.no_grad():
        for start in range(0, count, 16):
            part = scenes[start : start + 16]
            images = to_tensor([render(scene) for scene in part]).to(place)
            clean = vae.encode(images) * vae.config.scaling_factor
            told = encoder.encode([scene.caption for scene in part], complex_human_instruction=None)
            context = model.encode_caption(told.embeds.float(), told.mask)
            t = times[start : start + 16].to(place)
            # Drawn on the CPU: the same on every device.
            u = add_noise(clean, torch.randn(clean.shape).to(place), t)
            direction = flow_denoiser(velocity_of(model, context))(u, t)
            tangent = make_tangent("dual")(model, context, u, t, direction, None)
            sizes += tangent.flatten(1).square().mean(1).sqrt().tolist()
    return sizes


def section(found: Mapping[str, Sequence[Mapping[str, Any]]], steps: int) -> str:
    """The end of the Markdown page."""
    lines = [
        "",
        "### Dense time and QK norm (section 3.2)",
        "",
        f"Teachers of {steps} steps each from nothing, judged by {NUM_JUDGED} held-out prompts. The loss is the mean over the last",
        "quarter; gradient norms are before clipping. The tangent is cos(t) sin(t) dF/dt along the model's own trajectory, its root",
        "mean square over a latent: what a student that starts from this teacher would be taught with. Medians and maxima are over",
        f"a run's log and over {NUM_MEASURED} held-out pictures.",
        "",
        f"| variant | {' | '.join(COLUMNS.values())} |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name, scores in found.items():
        entries = (entry([each[key] for each in scores if key in each], key) for key in COLUMNS)
        lines.append(f"| {name} | {' | '.join(entries)} |")
    return "\n".join([*lines, "", f"![Loss and gradient norm by step]({PLOT})"]) + "\n"


def plot(found: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Loss and gradient norm of the first seed's runs, by step."""
    curves = {name: scores[0]["curves"] for name, scores in found.items()}
    panels = {
        title: {name: each[key] for name, each in curves.items()}
        for key, title in (("loss", "loss"), ("grad_norm", "gradient norm"))
    }
    draw_curves(panels, path)
