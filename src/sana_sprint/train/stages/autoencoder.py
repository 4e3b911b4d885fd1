"""Training a DC-AE, from scratch or from a folder: L1 + L2 reconstruction, noise on the latents."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sana_sprint import backends
from sana_sprint.images import grid, to_pil
from sana_sprint.models.autoencoder import AutoencoderConfig, AutoencoderDC
from sana_sprint.train import distributed
from sana_sprint.train.cache.files import digest
from sana_sprint.train.config import AutoencoderRun
from sana_sprint.train.data import VALIDATION_START, channels_last, open_source, pictures
from sana_sprint.train.data.pictures import fit
from sana_sprint.train.data.prefetch import Ahead
from sana_sprint.train.data.readers.base import Sample
from sana_sprint.train.data.sampler import own_parts
from sana_sprint.train.stages.base import Metrics, Part, Report, autocast
from sana_sprint.weights import load_model, save_model

NUM_VALIDATION = 128
_PARTS_AHEAD = 2


class AutoencoderStage:
    """See `stages.base.Stage`."""

    kept: Mapping[str, nn.Module] = {}

    def __init__(self, config: AutoencoderRun, *, report: Report) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.device = distributed.device()
        self.module = channels_last(_autoencoder(config).to(self.device))
        self.players = {"autoencoder": self.module}
        self.source = open_source(config.data.source, report=report, max_bad=config.data.max_bad_fraction)
        self.samples = Ahead(self._sample, is_concurrent=self.source.is_concurrent)
        training = self.source.training
        self.data: Mapping[str, str] = {
            "samples": str(len(training)),
            "pictures and captions": digest(self.source.digest(training))[:16],
        }

    def player(self, step: int) -> str:
        """The autoencoder, always."""
        return "autoencoder"

    def loss(self, part: Part) -> tuple[Tensor, Metrics]:
        """Reconstruction of the part's pictures from noised latents, plus the latents' size."""
        # While this part is computed, threads read the next ones.
        for each in itertools.islice(self._from(part), 1 + _PARTS_AHEAD):
            self.samples.expect(each.indices)
        image = self._images(part.indices)
        with autocast(self.config):
            latent = self.module.encode(image).float()
            restored = self.module.decode(
                latent + self.config.latent_noise * torch.randn_like(latent)
            ).float()
        difference = restored - image
        mse = difference.square().mean()
        loss = difference.abs().mean() + mse + self.config.latent_weight * latent.square().mean()
        return loss, {"psnr": _psnr(mse.item()), "latent_rms": float(latent.detach().square().mean().sqrt())}

    def validate(self, folder: Path, step: int) -> Metrics:
        """PSNR (dB, peak-to-peak 2) on unseen pictures; originals above reconstructions as a picture."""
        image = self._images(range(VALIDATION_START, VALIDATION_START + NUM_VALIDATION))
        with autocast(self.config):
            restored = torch.cat(
                [self.module.decode(self.module.encode(part)) for part in torch.split(image, 16)]
            )
        restored = restored.float().clamp(-1, 1)
        folder.mkdir(parents=True, exist_ok=True)
        grid(to_pil(torch.cat([image[:8], restored[:8], image[8:16], restored[8:16]])), columns=8).save(
            folder / f"{step:08d}.png"
        )
        return {"validation_psnr": _psnr(float((restored - image).square().mean()))}

    def export(self, folder: Path) -> None:
        """Writes the autoencoder's folder, its scaling factor set so that latents have unit variance."""
        image = self._images(range(512))
        with autocast(self.config):
            latent = torch.cat([self.module.encode(part) for part in torch.split(image, 32)]).float()
        config = replace(self.module.config, scaling_factor=round(1 / float(latent.std()), 5))
        self.module.config = config
        save_model(self.module, folder)

    def _images(self, indices: Sequence[int]) -> Tensor:
        self.samples.expect(indices)
        return pictures(self.samples, indices)[0].to(self.device)

    def _sample(self, index: int) -> Sample:
        pixels, captions = self.source(index)
        size = self.config.data.size
        return pixels if size is None else fit(pixels, size, size), captions

    def _from(self, part: Part) -> Iterator[Part]:
        """This part and those that follow it in this process, to the end of the training."""
        steps = range(part.step, self.config.schedule.steps)
        own = (each for step in steps for _, each in own_parts(step, self.config.schedule))
        return itertools.dropwhile(lambda each: each != part, own)


def _autoencoder(config: AutoencoderRun) -> AutoencoderDC:
    if config.start is not None:
        return backends.apply(load_model(AutoencoderDC, config.start, dtype=torch.float32)).train()
    assert config.model is not None  # as the config checks
    return backends.apply(AutoencoderDC(AutoencoderConfig.from_dict(config.model)))


def _psnr(mse: float) -> float:
    return 10 * math.log10(4 / mse)
