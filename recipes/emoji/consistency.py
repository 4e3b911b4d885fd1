"""Measures a student's consistency by noise level: `python -m recipes.emoji.consistency --model FOLDER --teacher FOLDER`.

From any point on a path of its guided teacher, a consistent student returns the end of the path. For each angle the table has
the mean squared distance between the student's one-step picture and the end of the path that starts at a noised picture, in
latents of unit variance, beside that of the teacher's own one-step picture (an untrained student). Picture scores tell that a
student is worse than its teacher; this tells at which noise levels.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from recipes.emoji.evaluate import Teacher
from recipes.emoji.scenes import render, sample_scene
from sana_sprint import backends
from sana_sprint.backends.prompt_cache import CachedPromptEncoder
from sana_sprint.models.text_encoder import load_text_encoder, load_tokenizer
from sana_sprint.models.transformer import SanaTransformer2DModel
from sana_sprint.train.cache.trajectories import trace
from sana_sprint.train.data.pictures import to_tensor
from sana_sprint.train.models.base import velocity_of
from sana_sprint.train.stages.captions import embed
from sana_sprint.trigflow import T_MAX, Velocity, add_noise, flow_denoiser, to_clean
from sana_sprint.weights import load_model, resolve_folder

ANGLES = (T_MAX, 1.3, 1.1, 0.9, 0.5, 0.2)
FIRST_SEED = 5_000_000  # training-split scenes beyond those of every run


def main() -> None:
    """Prints a Markdown table, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji", help="the student: a name or a pipeline folder")
    parser.add_argument("--teacher", type=Path, required=True, help="the teacher run's final folder")
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--guidance", type=float, default=4.5)
    parser.add_argument("--steps", type=int, default=24, help="of the teacher's paths")
    arguments = parser.parse_args()
    rows = distances(arguments)
    print("| angle | student | teacher in one step |\n|---|---|---|")
    for angle, student, teacher in rows:
        print(f"| {angle:.2f} | {student:.4f} | {teacher:.4f} |")
    print(json.dumps({**vars(arguments), "teacher": str(arguments.teacher), "rows": rows}))


@torch.no_grad()
def distances(arguments: argparse.Namespace) -> list[tuple[float, float, float]]:
    """Computes (angle, student's distance, teacher's distance) for every angle."""
    teacher = Teacher(arguments.teacher)
    folder = resolve_folder(arguments.model)
    student = backends.apply(load_model(SanaTransformer2DModel, folder / "transformer", dtype=torch.float32))
    encoder = CachedPromptEncoder(
        load_tokenizer(folder / "tokenizer"), load_text_encoder(folder / "text_encoder")
    )
    scenes = [sample_scene(FIRST_SEED + i) for i in range(arguments.count)]
    captions = [scene.caption for scene in scenes]
    torch.manual_seed(0)
    rows: list[tuple[float, float, float]] = []
    with torch.autocast("cpu", torch.bfloat16):
        vae = teacher.autoencoder
        u0 = vae.encode(to_tensor([render(scene) for scene in scenes])).float() * vae.config.scaling_factor
        taught = teacher.velocity(captions, arguments.guidance)
        told = embed(encoder, captions, instruction=True)
        scales = torch.full((len(scenes),), arguments.guidance)
        learnt = velocity_of(student, student.encode_caption(told.embeds, told.mask), scales)
        for angle in ANGLES:
            t = torch.full((len(scenes),), angle)
            u = add_noise(u0, torch.randn_like(u0), t)
            end = trace(taught, u, t, num_steps=arguments.steps)[:, -1].float()
            rows.append((angle, _distance(learnt, u, t, end), _distance(taught, u, t, end)))
    return rows


def _distance(velocity: Velocity, u: Tensor, t: Tensor, end: Tensor) -> float:
    return (to_clean(u, flow_denoiser(velocity)(u, t).float(), t) - end).square().mean().item()


if __name__ == "__main__":
    main()
