"""Scores the mean of all pictures that a caption allows: `python -m recipes.emoji3d.oracle AUTOENCODER`.

The best possible flow model draws this mean in one step. A world in which that is often right leaves few-step
distillation nothing to prove. The mean is taken over latents, then decoded and judged.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recipes.emoji3d.judge import judge_many, summarize
from recipes.emoji3d.samples import Prompt, evaluation_prompts, redraw
from recipes.emoji3d.scenes import render
from sana_sprint import backends
from sana_sprint.images import grid, to_pil
from sana_sprint.models.autoencoder import AutoencoderDC
from sana_sprint.weights import load_model


def main() -> None:
    """Prints the part of means that are correct, by task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("autoencoder", type=Path, help="folder, such as runs/emoji3d/autoencoder/final")
    parser.add_argument("--count", type=int, default=180, help="prompts (default: 180)")
    parser.add_argument("--pictures", type=int, default=16, help="pictures of each mean (default: 16)")
    parser.add_argument("--tier", default="everyday", help="whose concepts: everyday, further or all")
    parser.add_argument("--side", type=int, default=128, help="pixels of the pictures (default: 128)")
    parser.add_argument("--out", type=Path, help="a PNG file for the first 48 means")
    arguments = parser.parse_args()
    model = backends.apply(load_model(AutoencoderDC, arguments.autoencoder, dtype=torch.float32))
    prompts = evaluation_prompts(arguments.count, tier=arguments.tier)
    means = [mean_picture(model, prompt, arguments.pictures, arguments.side) for prompt in prompts]
    pictures = to_pil(torch.cat(means))
    for task, part in summarize(judge_many(pictures, prompts), prompts).items():
        print(f"{task:12} {part:.1%}")
    if arguments.out:
        grid(pictures[:48], columns=12).save(arguments.out)


@torch.no_grad()
def mean_picture(model: AutoencoderDC, prompt: Prompt, number: int, side: int) -> Tensor:
    """The decoded mean latent of so many pictures that the prompt allows: fp32 (1,3,side,side) in [-1,1]."""
    pixels = np.stack([np.asarray(render(redraw(prompt, seed), side)) for seed in range(number)])
    image = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    return model.decode(model.encode(image).mean(0, keepdim=True)).float().clamp(-1, 1)


if __name__ == "__main__":
    main()
