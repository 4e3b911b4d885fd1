"""Scores the emoji chain on held-out prompts with the compositional judge: `python -m recipes.emoji.evaluate`.

The student makes every picture through the public pipeline at 1, 2 and 4 steps; its teacher samples with 20 guided
Euler steps; both get the same noise. FID is the Frechet distance to real renders of other held-out prompts, in the embedded
autoencoder's features; these values are comparable only with one another. The autoencoder is scored by PSNR on unseen scenes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from recipes.emoji import judge
from recipes.emoji.scenes import SIZE, Scene, render
from sana_sprint import SanaSprintPipeline, backends
from sana_sprint.backends.prompt_cache import CachedPromptEncoder
from sana_sprint.evaluate.compositional import draw, score, table
from sana_sprint.evaluate.features import dcae_features, features_of
from sana_sprint.evaluate.frechet import distance, fit
from sana_sprint.images import to_pil
from sana_sprint.models.autoencoder import AutoencoderDC
from sana_sprint.models.text_encoder import load_text_encoder, load_tokenizer
from sana_sprint.models.transformer import SanaTransformer2DModel
from sana_sprint.train.config import StudentRun, load_config
from sana_sprint.train.distributed import device
from sana_sprint.train.losses.flow import guided, sample_flow
from sana_sprint.train.models.base import velocity_of
from sana_sprint.train.stages.captions import embed, unconditional
from sana_sprint.trigflow import Velocity
from sana_sprint.weights import load_model

BATCH = 50
RECIPE = Path(__file__).with_name("student-trajectories.toml")


def main() -> None:
    """Prints a Markdown table, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji", help="the student: a name or a pipeline folder")
    parser.add_argument(
        "--teacher", type=Path, help="the teacher run's final folder; left out, only the student is scored"
    )
    parser.add_argument("--count", type=int, default=300, help="number of held-out prompts, a multiple of 6")
    parser.add_argument("--guidance", type=float, default=4.5)
    parser.add_argument("--teacher-steps", type=int, default=20)
    parser.add_argument("--out", type=Path, help="a folder for sheets of the judged pictures")
    arguments = parser.parse_args()

    scenes = judge.evaluation_scenes(arguments.count)
    captions = [scene.caption for scene in scenes]
    rows: dict[str, dict[str, float]] = {}
    drawn: dict[str, list[Image.Image]] = {}
    if arguments.teacher:
        pictures = teacher_pictures(arguments.teacher, scenes, arguments.guidance, arguments.teacher_steps)
        name = f"teacher, {arguments.teacher_steps} guided steps"
        rows[name] = score(judge, pictures, scenes, name="teacher", folder=arguments.out)
        drawn[name] = pictures
    pipeline = SanaSprintPipeline.from_pretrained(arguments.model, torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    for steps in (1, 2, 4):
        pictures = draw(pipeline, captions, num_steps=steps, guidance=arguments.guidance)
        name = f"student, {steps} step{'s' * (steps > 1)}"
        rows[name] = score(judge, pictures, scenes, name=f"student{steps}", folder=arguments.out)
        drawn[name] = pictures
    # The same number of each task, from other seeds.
    real = [render(scene) for scene in judge.evaluation_scenes(5 * arguments.count)[arguments.count :]]
    distances = fid(pipeline.vae, drawn, real)
    psnr = autoencoder_psnr(pipeline.vae)

    print(table(rows))
    for name, value in distances.items():
        print(f"FID of {name}: {value:.2f}")
    print(f"autoencoder: {psnr:.2f} dB on 300 unseen scenes")
    print(json.dumps({"count": len(scenes), "autoencoder_psnr": psnr, "fid": distances, **rows}))


class Teacher:
    """A teacher run's final folder with the guidance of a student's training; fp32 weights, called under bf16 autocast."""

    def __init__(self, folder: Path, student: Path = RECIPE) -> None:
        recipe = load_config(student)
        assert isinstance(recipe, StudentRun)
        self.recipe = recipe
        self.device = device()
        self.transformer = backends.apply(
            load_model(SanaTransformer2DModel, folder / "transformer", device=self.device)
        )
        self.autoencoder = backends.apply(load_model(AutoencoderDC, folder / "vae", device=self.device))
        self.autoencoder.to(memory_format=torch.channels_last)
        text_encoder = load_text_encoder(folder / "text_encoder", device=self.device)
        self.encoder = CachedPromptEncoder(load_tokenizer(folder / "tokenizer"), text_encoder)

    def velocity(self, captions: Sequence[str], guidance: float) -> Velocity:
        """Predicts the guided velocity for pictures with these captions."""
        embeddings = embed(self.encoder, captions, instruction=True)
        captioned = self.transformer.encode_caption(embeddings.embeds, embeddings.mask)
        return guided(
            velocity_of(self.transformer, captioned),
            velocity_of(self.transformer, unconditional(self.transformer, embeddings)),
            torch.full((len(captions),), guidance, device=self.device),
            projected=self.recipe.guidance_projected,
            limit=self.recipe.guidance_limit,
            start=self.recipe.guidance_from,
        )


@torch.no_grad()
def teacher_pictures(folder: Path, scenes: list[Scene], guidance: float, steps: int) -> list[Image.Image]:
    """Draws the same prompts with the teacher."""
    teacher = Teacher(folder)
    config, vae = teacher.transformer.config, teacher.autoencoder
    shape = config.in_channels, config.sample_size, config.sample_size
    pictures: list[Image.Image] = []
    for start in range(0, len(scenes), BATCH):
        part = scenes[start : start + BATCH]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        noise = noise.to(teacher.device)
        with torch.autocast(teacher.device.type, torch.bfloat16):
            velocity = teacher.velocity([scene.caption for scene in part], guidance)
            latent = sample_flow(velocity, noise, num_steps=steps)
            pictures += to_pil(vae.decode(latent / vae.config.scaling_factor).float())
    return pictures


def fid(
    autoencoder: AutoencoderDC, drawn: Mapping[str, Sequence[Image.Image]], real: Sequence[Image.Image]
) -> dict[str, float]:
    """Computes each set's Frechet distance to real pictures, in the autoencoder's features."""
    extract = dcae_features(autoencoder)
    wanted = fit(features_of(real, extract, size=SIZE))
    return {
        name: distance(fit(features_of(pictures, extract, size=SIZE)), wanted)
        for name, pictures in drawn.items()
    }


@torch.no_grad()
def autoencoder_psnr(autoencoder: AutoencoderDC) -> float:
    """Computes the mean PSNR in dB over pictures of unseen scenes."""
    pixels = np.stack([np.asarray(render(scene)) for scene in judge.evaluation_scenes(300)])
    image = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    restored = torch.cat(
        [autoencoder.decode(autoencoder.encode(part.to(autoencoder.dtype))) for part in image.split(30)]
    )
    mse = (restored.float().clamp(-1, 1) - image).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / mse)).mean().item()


if __name__ == "__main__":
    main()
