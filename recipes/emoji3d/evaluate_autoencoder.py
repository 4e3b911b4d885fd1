"""Scores an autoencoder on scenes that it has not seen: `python -m recipes.emoji3d.evaluate_autoencoder FOLDER`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recipes.emoji3d.samples import evaluation_prompts
from recipes.emoji3d.scenes import render
from sana_sprint import backends
from sana_sprint.images import grid, to_pil
from sana_sprint.models.autoencoder import AutoencoderDC
from sana_sprint.weights import load_model

_BATCH = 16
_SHOWN = 24


def main() -> None:
    """Prints the PSNR of all scenes and of each task's, and writes originals over reconstructions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="such as runs/emoji3d/autoencoder/final")
    parser.add_argument("--count", type=int, default=300, help="number of scenes (default: 300)")
    parser.add_argument("--side", type=int, default=128, help="pixels of the pictures (default: 128)")
    parser.add_argument("--tier", default="everyday", help="whose concepts: everyday, further or all")
    parser.add_argument("--out", type=Path, help="a PNG file for the first 24 and their reconstructions")
    arguments = parser.parse_args()
    model = backends.apply(load_model(AutoencoderDC, arguments.folder, dtype=torch.float32))
    prompts = evaluation_prompts(arguments.count, tier=arguments.tier)
    image = _tensor([np.asarray(render(prompt.scene, arguments.side)) for prompt in prompts])
    restored = reconstruct(model, image)
    error = (restored - image).square().flatten(1).mean(1)
    each = 10 * torch.log10(4 / error)
    print(f"{each.mean():.2f} dB as the mean over {len(prompts)} scenes")
    print(f"{10 * torch.log10(4 / error.mean()):.2f} dB from the mean squared error of all of them")
    for task in dict.fromkeys(prompt.scene.task for prompt in prompts):
        own = torch.tensor([prompt.scene.task == task for prompt in prompts])
        print(f"  {task:12} {each[own].mean():.2f} dB")
    plain = torch.tensor([prompt.scene.background.pattern is None for prompt in prompts])
    print(f"  on plain backgrounds {each[plain].mean():.2f} dB, on patterns {each[~plain].mean():.2f} dB")
    if arguments.out:
        rows = [torch.cat([image[i : i + 8], restored[i : i + 8]]) for i in range(0, _SHOWN, 8)]
        grid(to_pil(torch.cat(rows)), columns=8).save(arguments.out)


@torch.no_grad()
def reconstruct(model: AutoencoderDC, image: Tensor) -> Tensor:
    """Encodes and decodes pictures, fp32 (B,3,H,W) in [-1,1]."""
    parts = [model.decode(model.encode(part)) for part in image.split(_BATCH)]
    return torch.cat(parts).float().clamp(-1, 1)


def _tensor(pixels: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float().div(127.5).sub(1)


if __name__ == "__main__":
    main()
