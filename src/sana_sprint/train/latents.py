"""Latents computed once, kept on disk, and read back only if they are what this run needs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from sana_sprint.models.autoencoder import AutoencoderDC
from sana_sprint.train import distributed
from sana_sprint.train.data import open_source, pictures
from sana_sprint.train.loop import Report

_ENCODE_BATCH = 32


class LatentCache:
    """`latents` (n,C,h,w) bf16, unit variance, and one or more captions for each."""

    def __init__(self, latents: Tensor, captions: Sequence[Sequence[str]]) -> None:
        self.latents = latents
        self.captions = captions

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, indices: Tensor) -> tuple[Tensor, list[str]]:
        """(B,C,h,w) fp32 at these indices, and for each one of its captions, drawn by torch's generator."""
        chosen = torch.rand(len(indices)).tolist()
        captions = [self.captions[i] for i in indices.tolist()]
        drawn = [texts[int(part * len(texts))] for texts, part in zip(captions, chosen, strict=True)]
        return self.latents[indices].float(), drawn


def cached_latents(
    folder: Path, source: str, num_samples: int, autoencoder: AutoencoderDC, *, report: Report
) -> LatentCache:
    """Samples 0 to num_samples - 1 of a source, encoded.

    The file's name is a hash of the autoencoder's weights and config, the source, the count and a sample of its
    pictures, so that another autoencoder or changed data never meets stale latents.
    """
    path = folder / f"latents-{_key(source, num_samples, autoencoder)}.safetensors"
    if distributed.rank() != 0:
        distributed.barrier()  # the first process writes, the others read
        return _read(path)
    if not path.is_file():
        _encode(path, source, num_samples, autoencoder)
    report(f"latents: {path}")
    distributed.barrier()
    return _read(path)


def shuffled(indices: range, count: int, seed: int) -> Tensor:
    """Positions of a stream that runs through all samples in a new order each epoch: (len(indices),)."""
    stream = torch.tensor(list(indices))
    epochs = stream // count
    orders = {
        epoch: torch.randperm(count, generator=torch.Generator().manual_seed(seed * 7919 + epoch))
        for epoch in set(epochs.tolist())
    }
    return torch.stack(
        [orders[int(epoch)][position] for epoch, position in zip(epochs, stream % count, strict=True)]
    )


def _encode(path: Path, source: str, num_samples: int, autoencoder: AutoencoderDC) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sample = open_source(source)
    parts, captions = [], []
    for start in tqdm(range(0, num_samples, _ENCODE_BATCH), desc="latents", dynamic_ncols=True):
        image, texts = pictures(sample, range(start, min(start + _ENCODE_BATCH, num_samples)))
        with torch.no_grad(), torch.autocast(autoencoder.device.type, torch.bfloat16):
            latent = autoencoder.encode(image.to(autoencoder.device))
        parts.append((latent.float() * autoencoder.config.scaling_factor).bfloat16().cpu())
        captions += texts
    partial = path.with_suffix(".partial")
    save_file(
        {"latents": torch.cat(parts).contiguous()}, partial, metadata={"captions": json.dumps(captions)}
    )
    os.replace(partial, path)


def _read(path: Path) -> LatentCache:
    with safe_open(path, "pt") as file:
        return LatentCache(file.get_tensor("latents"), json.loads(file.metadata()["captions"]))


def _key(source: str, num_samples: int, autoencoder: AutoencoderDC) -> str:
    digest = hashlib.sha256(f"{source}|{num_samples}|{autoencoder.config}".encode())
    for name, tensor in sorted(autoencoder.encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    sample = open_source(source)
    for index in range(0, num_samples, max(1, num_samples // 16)):
        pixels, captions = sample(index)
        digest.update(pixels.tobytes())
        digest.update("|".join(captions).encode())
    return digest.hexdigest()[:16]
