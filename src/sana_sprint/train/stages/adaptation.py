"""Fine-tuning a flow-matching teacher that lacks dense time or QK norm, so that it can be distilled."""

from __future__ import annotations

import torch

from sana_sprint import backends
from sana_sprint.backends.prompt_cache import CachedPromptEncoder
from sana_sprint.models.text_encoder import load_text_encoder, load_tokenizer
from sana_sprint.models.transformer import SanaTransformer2DModel
from sana_sprint.train.config import AdaptationRun
from sana_sprint.train.losses.flow import logit_normal_times
from sana_sprint.train.models.adaptation import densify_time, with_qk_norm
from sana_sprint.train.models.base import velocity_of
from sana_sprint.train.stages.base import Report, autocast
from sana_sprint.train.stages.captions import embed, frozen_embed
from sana_sprint.train.stages.flow import FlowStage
from sana_sprint.weights import load_model, resolve_folder

NUM_MEASURED = 16  # samples from which the sizes of queries and keys are taken


class AdaptationStage(FlowStage):
    """From a pipeline's folder: its transformer learns, its text encoder stays."""

    def __init__(self, config: AdaptationRun, *, report: Report) -> None:
        folder = resolve_folder(str(config.teacher))
        super().__init__(config, folder / "vae", report=report)
        text_encoder = load_text_encoder(folder / "text_encoder", device=self.device).requires_grad_(False)
        self.encoder = CachedPromptEncoder(load_tokenizer(folder / "tokenizer"), text_encoder)
        self.embed = frozen_embed(config, self.encoder, self.cache.captions, report=report)
        old = load_model(SanaTransformer2DModel, folder / "transformer", dtype=torch.float32).to(self.device)
        self.transformer = backends.apply(with_qk_norm(backends.apply(old), self._evaluate)).train()
        if error := densify_time(self.transformer):
            report(f"dense time: the new embedding differs from the old one by {error:.1%}")
        self.transformer.gradient_checkpointing = config.gradient_checkpointing
        self.players = {"teacher": self.transformer}

    @torch.no_grad()
    def _evaluate(self, model: SanaTransformer2DModel) -> None:
        """Runs the old model on noised training samples."""
        u0, captions = self.cache.batch(self.cache.buckets[self.cache.shape][:NUM_MEASURED])
        u0 = u0.to(self.device)
        s = logit_normal_times(len(u0), mean=self.config.time_mean, std=self.config.time_std).to(self.device)
        noise, level = torch.randn_like(u0), s[:, None, None, None]
        with autocast(self.config):
            embeddings = embed(self.encoder, captions, instruction=False)
            context = model.encode_caption(embeddings.embeds, embeddings.mask)
            velocity_of(model, context)((1 - level) * u0 + level * noise, s)
