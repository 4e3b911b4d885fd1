"""Distilling a teacher into a consistency student: sCM, with the guidance scale as an input."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sana_sprint.images import grid, to_pil
from sana_sprint.models.autoencoder import AutoencoderDC
from sana_sprint.models.text_encoder import PromptEmbeddings, PromptEncoder, load_text_encoder, load_tokenizer
from sana_sprint.models.transformer import SanaTransformer2DModel
from sana_sprint.sampling import SCMScheduler, sample, schedule
from sana_sprint.train.conditioning import embed, unconditional
from sana_sprint.train.config import StudentRun
from sana_sprint.train.data import VALIDATION_START, channels_last, open_source
from sana_sprint.train.latents import cached_latents, shuffled
from sana_sprint.train.losses import consistency_target, scaled_tangent, scm_loss
from sana_sprint.train.stage import Metrics, Part, Report, autocast
from sana_sprint.trigflow import Denoiser, add_noise, flow_denoiser, lognormal_times, trig_to_flow
from sana_sprint.weights import ModelIndex, load_model, save_model, write_model_index


class Student(nn.Module):
    """A transformer with guidance embedding, and the loss's log variance, a linear map of its time embedding."""

    def __init__(self, transformer: SanaTransformer2DModel, latent_size: int) -> None:
        super().__init__()
        self.transformer = transformer
        self.logvar = nn.Linear(transformer.config.width, 1)
        nn.init.xavier_uniform_(self.logvar.weight)
        # The target has norm 1 at most, so its mean square is near 1/size: start the log variance there.
        nn.init.constant_(self.logvar.bias, -math.log(latent_size))


class StudentStage:
    """See `loop.Stage`. The student starts equal to its teacher."""

    def __init__(self, config: StudentRun, *, report: Report) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.teacher = load_model(SanaTransformer2DModel, config.teacher / "transformer").requires_grad_(
            False
        )
        text_encoder = load_text_encoder(config.teacher / "text_encoder").requires_grad_(False)
        self.encoder = PromptEncoder(load_tokenizer(config.teacher / "tokenizer"), text_encoder)
        self.autoencoder = channels_last(load_model(AutoencoderDC, config.teacher / "vae"))
        self.cache = cached_latents(
            config.output.parent, config.data.source, config.data.num_samples, self.autoencoder, report=report
        )
        self.transformer = with_guidance(self.teacher)
        # Forward-mode differentiation has no rule for fused attention.
        self.transformer.set_fused_attention(False)
        self.module = Student(self.transformer, self.cache.latents[0].numel())
        self.players = {"student": self.module}
        source = open_source(config.data.source)
        self.validation_captions = [source(VALIDATION_START + i)[1][0] for i in range(8)]

    def player(self, step: int) -> str:
        """The student, always."""
        return "student"

    def loss(self, part: Part) -> tuple[Tensor, Metrics]:
        """The sCM loss on a part of the shuffled cache."""
        config = self.config
        u0, captions = self.cache.batch(shuffled(part.indices, len(self.cache), config.seed))
        t = lognormal_times(len(u0), mean=config.time_mean, std=config.time_std)
        scales = torch.tensor(config.guidance_scales)
        guidance = scales[torch.randint(len(scales), (len(u0),))]
        u = add_noise(u0, torch.randn_like(u0), t)
        with autocast(self.config):
            instruction = float(torch.rand(())) < config.instruction_rate
            with torch.no_grad():
                embeddings = embed(self.encoder, captions, instruction=instruction)
                teacher_F = self._teacher_output(u, t, embeddings, guidance)
                tangent = scaled_tangent(self._student(embeddings, guidance), u, t, teacher_F)
            F = self._student(embeddings, guidance)(u, t).float()
            _, embedding = self.transformer.embed_time(trig_to_flow(t), guidance)
            logvar = self.module.logvar(embedding).float().squeeze(1)
        warmup = min(1.0, part.step / max(1, config.tangent_warmup_steps))
        g = consistency_target(F.detach(), teacher_F, tangent, u, t, tangent_weight=warmup)
        loss, metrics = scm_loss(F, g, t, logvar)
        return loss, {**metrics, "tangent_norm": tangent.flatten(1).norm(dim=1).mean().item()}

    def validate(self, folder: Path, step: int) -> Metrics:
        """Pictures of fixed prompts from fixed noise: a row each at 1, 2 and 4 steps."""
        shape = (len(self.validation_captions), *self.cache.latents.shape[1:])
        with autocast(self.config):
            embeddings = embed(self.encoder, self.validation_captions, instruction=True)
            denoiser = self._student(embeddings, torch.full((shape[0],), 4.5))
            rows = []
            for num_steps in (1, 2, 4):
                generator = torch.Generator().manual_seed(0)

                def draw(generator: torch.Generator = generator) -> Tensor:
                    return torch.randn(shape, generator=generator)

                latent = sample(denoiser, draw(), schedule(num_steps), draw_noise=draw)
                rows.append(self.autoencoder.decode(latent / self.autoencoder.config.scaling_factor).float())
        folder.mkdir(parents=True, exist_ok=True)
        grid(to_pil(torch.cat(rows)), columns=shape[0]).save(folder / f"{step:08d}.png")
        (folder / "captions.txt").write_text("\n".join(self.validation_captions) + "\n", encoding="utf-8")
        return {"latent_rms": latent.square().mean().sqrt().item()}

    def export(self, folder: Path) -> None:
        """Writes a whole pipeline folder, weights in bf16."""
        save_model(self.transformer.to(torch.bfloat16), folder / "transformer")
        self.transformer.float()
        for part in ("text_encoder", "tokenizer", "vae"):
            shutil.copytree(self.config.teacher / part, folder / part, dirs_exist_ok=True)
        SCMScheduler().save_pretrained(folder / "scheduler")
        write_model_index(folder, sprint_index(type(self.encoder.tokenizer).__name__))

    def _teacher_output(self, u: Tensor, t: Tensor, embeddings: PromptEmbeddings, guidance: Tensor) -> Tensor:
        """The guided teacher's F: (B,C,H,W) fp32. Guidance is linear, so it is the same before and after the transform."""
        conditional = self.teacher.encode_caption(embeddings.embeds, embeddings.mask)
        empty = unconditional(self.teacher, embeddings)
        with_caption = flow_denoiser(lambda x, s: self.teacher(x, s, conditional))(u, t).float()
        without = flow_denoiser(lambda x, s: self.teacher(x, s, empty))(u, t).float()
        return without + guidance[:, None, None, None] * (with_caption - without)

    def _student(self, embeddings: PromptEmbeddings, guidance: Tensor) -> Denoiser:
        context = self.transformer.encode_caption(embeddings.embeds, embeddings.mask)
        return flow_denoiser(lambda x, s: self.transformer(x, s, context, guidance))


def sprint_index(tokenizer_class: str) -> ModelIndex:
    """The model_index.json of a SANA-Sprint pipeline, with the published class names."""
    return ModelIndex(
        class_name="SanaSprintPipeline",
        components={
            "scheduler": ("diffusers", "SCMScheduler"),
            "text_encoder": ("transformers", "Gemma2Model"),
            "tokenizer": ("transformers", tokenizer_class),
            "transformer": ("diffusers", "SanaTransformer2DModel"),
            "vae": ("diffusers", "AutoencoderDC"),
        },
    )


def with_guidance(teacher: SanaTransformer2DModel) -> SanaTransformer2DModel:
    """A copy of the teacher with a guidance embedding whose last layer is zero, so that both compute the same.

    Only the last: were the first layer zero too, neither would ever get a gradient.
    """
    student = SanaTransformer2DModel(replace(teacher.config, guidance_embeds=True))
    state = {
        name.replace("time_embed.emb.", "time_embed."): value for name, value in teacher.state_dict().items()
    }
    embedder = "time_embed.guidance_embedder"
    nn.init.normal_(student.get_parameter(f"{embedder}.linear_1.weight"), std=0.02)
    nn.init.zeros_(student.get_parameter(f"{embedder}.linear_1.bias"))
    nn.init.zeros_(student.get_parameter(f"{embedder}.linear_2.weight"))
    nn.init.zeros_(student.get_parameter(f"{embedder}.linear_2.bias"))
    own = {name: value for name, value in student.state_dict().items() if name.startswith(embedder)}
    student.load_state_dict({**state, **own})
    return student
