"""Flow matching on cached latents: what training a teacher and adapting one have in common."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sana_sprint import backends
from sana_sprint.images import grid, to_pil
from sana_sprint.models.autoencoder import AutoencoderDC
from sana_sprint.models.text_encoder import PromptEmbeddings, PromptEncoder
from sana_sprint.models.transformer import CaptionContext, SanaTransformer2DModel
from sana_sprint.train import distributed
from sana_sprint.train.cache.latents import latents_of_run
from sana_sprint.train.config import AdaptationRun, ControlTeacherRun, TeacherRun
from sana_sprint.train.data import channels_last
from sana_sprint.train.losses.flow import flow_loss, guided, logit_normal_times, sample_flow
from sana_sprint.train.metrics import by_level
from sana_sprint.train.models.base import Embed, velocity_of
from sana_sprint.train.models.text_encoder import save_text
from sana_sprint.train.stages.base import Metrics, Part, Report, autocast
from sana_sprint.train.stages.captions import drop_captions, embed, unconditional
from sana_sprint.trigflow import Velocity
from sana_sprint.weights import load_model, save_model

NUM_VALIDATION_CAPTIONS = 16


class FlowStage:
    """See `stage.Stage`. Subclasses set the attributes below. The latents' cache lies beside the output.

    Args:
        config: the run.
        autoencoder: folder of the DC-AE.
        report: receives lines about the cache.
    """

    transformer: SanaTransformer2DModel
    encoder: PromptEncoder
    embed: Embed
    players: dict[str, nn.Module]
    kept: Mapping[str, nn.Module] = {}

    def __init__(
        self, config: TeacherRun | AdaptationRun | ControlTeacherRun, autoencoder: Path, *, report: Report
    ) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.device = distributed.device()
        self.autoencoder_folder = autoencoder
        self.autoencoder = channels_last(
            backends.apply(load_model(AutoencoderDC, autoencoder, dtype=torch.float32, device=self.device))
        )
        self.cache, self.validation_captions = latents_of_run(
            config, self.autoencoder, num_validation=NUM_VALIDATION_CAPTIONS, report=report
        )

    @property
    def data(self) -> Mapping[str, str]:
        """The latents'."""
        return self.cache.facts

    def player(self, step: int) -> str:
        """The teacher, always."""
        return "teacher"

    def loss(self, part: Part) -> tuple[Tensor, Metrics]:
        """Flow-matching loss on a part of the shuffled cache."""
        order = self.cache.shuffled(
            part.indices, batch_size=self.config.schedule.batch_size, seed=self.config.seed
        )
        u0, captions = self.cache.batch(order)
        u0 = u0.to(self.device)
        flow_t = logit_normal_times(len(u0), mean=self.config.time_mean, std=self.config.time_std)
        instruction = float(torch.rand(())) < self.config.instruction_rate
        with autocast(self.config):
            embeddings = self.embed(captions, instruction=instruction)
            dropped = torch.rand(len(u0), device=self.device) < self.config.caption_dropout
            context = self.context(order, embeddings.embeds, drop_captions(embeddings.mask, dropped))
            losses = flow_loss(self.velocity(context), u0, torch.randn_like(u0), flow_t.to(self.device))
        return losses.mean(), by_level("loss", losses, flow_t)

    def context(self, order: Tensor, embeds: Tensor, mask: Tensor) -> CaptionContext:
        """The model's context for the samples at these places of the cache, whose embedded captions these are."""
        return self.transformer.encode_caption(embeds, mask)

    def velocity(self, context: CaptionContext) -> Velocity:
        """The model under a context."""
        return velocity_of(self.transformer, context)

    def validate(self, folder: Path, step: int) -> Metrics:
        """Guided 20-step pictures of fixed prompts from fixed noise."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(len(self.validation_captions), *self.cache.shape, generator=generator)
        noise = noise.to(self.device)
        with autocast(self.config):
            embeddings = embed(self.encoder, self.validation_captions, instruction=True)
            captioned, uncaptioned = self.validation_contexts(embeddings)
            velocity = guided(
                self.velocity(captioned), self.velocity(uncaptioned), self.config.guidance_scale
            )
            latent = sample_flow(velocity, noise)
            image = self.autoencoder.decode(latent / self.autoencoder.config.scaling_factor)
        folder.mkdir(parents=True, exist_ok=True)
        grid(to_pil(image.float()), columns=8).save(folder / f"{step:08d}.png")
        (folder / "captions.txt").write_text("\n".join(self.validation_captions) + "\n", encoding="utf-8")
        return {"latent_rms": latent.square().mean().sqrt().item()}

    def validation_contexts(self, embeddings: PromptEmbeddings) -> tuple[CaptionContext, CaptionContext]:
        """The model's contexts for the validation captions, and for no caption."""
        return (
            self.transformer.encode_caption(embeddings.embeds, embeddings.mask),
            unconditional(self.transformer, embeddings),
        )

    def export(self, folder: Path) -> None:
        """Writes transformer, text encoder, tokenizer and autoencoder as folders of one model."""
        save_model(self.transformer, folder / "transformer")
        save_text(self.encoder.tokenizer, self.encoder.text_encoder, folder)
        shutil.copytree(self.autoencoder_folder, folder / "vae", dirs_exist_ok=True)
