"""CLIP score: agreement of pictures with their captions, by a CLIP model of the open_clip package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sana_sprint.images import read_picture, read_settings

BATCH = 32

Scorer = Callable[[Sequence[Path], Sequence[str]], list[float]]


def caption_of(picture: Path) -> str:
    """The text of the .txt file beside a picture, or else the prompt in its own settings.

    Raises:
        ValueError: the picture has neither.
    """
    sidecar = picture.with_suffix(".txt")
    if sidecar.is_file():
        return sidecar.read_text(encoding="utf-8").strip()
    settings = read_settings(read_picture(picture)) or {}
    if not settings.get("prompt"):
        raise ValueError(
            f"{picture} has no caption: neither a .txt file beside it nor a prompt in its settings"
        )
    return str(settings["prompt"])


def clip_scorer(model: str, weights: str, *, device: str = "cpu") -> Scorer:
    """A function from pictures' files and captions to their scores, 100 max(0, cosine) (arXiv 2104.08718, unscaled by 2.5).

    Args:
        model: an open_clip architecture, such as "ViT-L-14".
        weights: a file on this machine, or an open_clip tag such as "openai", which it downloads.
        device: of the computation.

    Raises:
        ImportError: open_clip is not installed.
        ValueError: no such model or weights, or they could not be fetched.
    """
    import open_clip

    try:
        network, _, transform = open_clip.create_model_and_transforms(
            model, pretrained=weights, device=device
        )
        tokenize = open_clip.get_tokenizer(model)
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"cannot load CLIP {model} with weights {weights}: {error}") from error
    network.eval()

    @torch.no_grad()
    def score(pictures: Sequence[Path], captions: Sequence[str]) -> list[float]:
        scores: list[float] = []
        for start in range(0, len(pictures), BATCH):
            part = slice(start, start + BATCH)
            images = torch.stack([transform(read_picture(path).convert("RGB")) for path in pictures[part]])
            seen = _unit(network.encode_image(images.to(device)))
            said = _unit(network.encode_text(tokenize(list(captions[part])).to(device)))
            scores += (100 * (seen * said).sum(1)).clamp(min=0).tolist()
        return scores

    return score


def _unit(features: Any) -> Any:
    return features.float() / features.float().norm(dim=1, keepdim=True)
