"""Scores a model of the second world on held-out prompts: `python -m recipes.emoji3d.evaluate --model FOLDER`.

The student draws through the public pipeline at 1, 2, 4 and 8 steps; its teacher with 1 and 20 guided Euler steps; all
from the same noise. Beside the judge's answers stand the variety of what captions leave open (`variety`) and the Frechet
distance to real pictures of other held-out prompts, in the features of the model's own autoencoder: comparable only with
each other. Phrasings and synonyms that training never has are reported apart.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from recipes.emoji.evaluate import Teacher
from recipes.emoji3d.captions import WORDINGS
from recipes.emoji3d.judge import judge_many, summarize
from recipes.emoji3d.samples import Prompt, evaluation_prompts
from recipes.emoji3d.scenes import render
from recipes.emoji3d.variety import variety
from sana_sprint import SanaSprintPipeline
from sana_sprint.evaluate.compositional import draw, table
from sana_sprint.evaluate.features import dcae_features, features_of
from sana_sprint.evaluate.frechet import distance, fit
from sana_sprint.images import grid, to_pil
from sana_sprint.models.autoencoder import AutoencoderDC
from sana_sprint.train.losses.flow import sample_flow

RECIPE = Path(__file__).with_name("student-128.toml")
_BATCH = 50


def main() -> None:
    """Prints Markdown tables, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="the student's pipeline folder; left out, only the teacher is scored")
    parser.add_argument("--teacher", type=Path, help="the teacher run's final folder")
    parser.add_argument("--count", type=int, default=600, help="held-out prompts (default: 600)")
    parser.add_argument("--tier", default="everyday", help="whose concepts: everyday, further or all")
    parser.add_argument("--guidance", type=float, default=4.5)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8], help="of the student")
    parser.add_argument("--teacher-steps", type=int, nargs="+", default=[1, 20])
    parser.add_argument(
        "--recipe", type=Path, default=RECIPE, help="the student's, for the teacher's guidance"
    )
    parser.add_argument("--out", type=Path, help="a folder for sheets and verdicts")
    arguments = parser.parse_args()
    if not (arguments.model or arguments.teacher):
        parser.error("give --model, --teacher or both")

    rows: dict[str, tuple[dict[str, float], dict[str, float]]] = {}
    drawn: dict[str, list[Image.Image]] = {}
    autoencoder: AutoencoderDC | None = None
    prompts = {w: evaluation_prompts(arguments.count, tier=arguments.tier, wording=w) for w in WORDINGS}
    if arguments.teacher:
        teacher = Teacher(arguments.teacher, arguments.recipe)
        autoencoder = teacher.autoencoder
        for steps in arguments.teacher_steps:
            name = f"teacher, {steps} steps"
            drawn[name] = teacher_pictures(teacher, prompts["known"], arguments.guidance, steps)
            rows[name] = _score(drawn[name], prompts["known"], name, arguments.out)
    if arguments.model:
        pipeline = SanaSprintPipeline.from_pretrained(arguments.model, torch_dtype=torch.bfloat16)
        pipeline.set_progress_bar_config(disable=True)
        if torch.cuda.is_available():
            pipeline.to("cuda")
        autoencoder = pipeline.vae
        for wording in WORDINGS:
            for steps in arguments.steps if wording == "known" else arguments.steps[:2]:
                name = f"student, {steps} steps" + (f", unseen {wording}" if wording != "known" else "")
                captions = [prompt.caption for prompt in prompts[wording]]
                drawn[name] = draw(pipeline, captions, num_steps=steps, guidance=arguments.guidance)
                rows[name] = _score(drawn[name], prompts[wording], name, arguments.out)
    print(table({name: judged for name, (judged, _) in rows.items()}))
    for name, (_, entropies) in rows.items():
        print(
            f"variety of {name}: {', '.join(f'{key} {value:.2f}' for key, value in entropies.items())} bits"
        )
    assert autoencoder is not None
    distances = _distances(autoencoder, drawn, arguments.count, arguments.tier)
    for name, value in distances.items():
        print(f"FID of {name}: {value:.2f}")
    varieties = {name: entropies for name, (_, entropies) in rows.items()}
    scores = {name: judged for name, (judged, _) in rows.items()}
    print(json.dumps({"count": arguments.count, "fid": distances, "variety": varieties, **scores}))


@torch.no_grad()
def teacher_pictures(
    teacher: Teacher, prompts: Sequence[Prompt], guidance: float, steps: int
) -> list[Image.Image]:
    """Draws prompts with guided Euler steps; picture i has the noise of seed i."""
    config, vae = teacher.transformer.config, teacher.autoencoder
    shape = config.in_channels, config.sample_size, config.sample_size
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), _BATCH):
        part = prompts[start : start + _BATCH]
        noise = torch.stack(
            [torch.randn(shape, generator=torch.Generator().manual_seed(start + i)) for i in range(len(part))]
        ).to(teacher.device)
        with torch.autocast(teacher.device.type, torch.bfloat16):
            velocity = teacher.velocity([prompt.caption for prompt in part], guidance)
            latent = sample_flow(velocity, noise, num_steps=steps)
            pictures += to_pil(vae.decode(latent / vae.config.scaling_factor).float())
    return pictures


def _score(
    pictures: Sequence[Image.Image], prompts: Sequence[Prompt], name: str, folder: Path | None
) -> tuple[dict[str, float], dict[str, float]]:
    """The judge's summary and the variety; writes a sheet and all verdicts."""
    verdicts = judge_many(pictures, prompts)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        stem = name.replace(", ", "-").replace(" ", "-")
        grid(list(pictures[:96]), columns=12).save(folder / f"{stem}.png")
        lines = [f"{v.correct}\t{p.caption}\t{v.reason}" for v, p in zip(verdicts, prompts, strict=True)]
        (folder / f"{stem}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return summarize(verdicts, prompts), variety(verdicts, prompts)


def _distances(
    autoencoder: AutoencoderDC, drawn: dict[str, list[Image.Image]], count: int, tier: str
) -> dict[str, float]:
    """Each set's Frechet distance; none for so few pictures that the features' covariance cannot be told."""
    extract = dcae_features(autoencoder)
    side = next(iter(drawn.values()))[0].width
    others = evaluation_prompts(5 * count, tier=tier)[count:]
    if count <= features_of([next(iter(drawn.values()))[0]], extract, size=side).shape[1]:
        return {}
    wanted = fit(features_of([render(prompt.scene, side) for prompt in others], extract, size=side))
    return {name: distance(fit(features_of(own, extract, size=side)), wanted) for name, own in drawn.items()}


if __name__ == "__main__":
    main()
