"""Distilling a teacher into a student for 1 to 4 steps: consistency (sCM) and adversarial (LADD) losses together.

Algorithm 2 of SANA-Sprint (arXiv 2503.09641), and on request distribution matching and the teacher's trajectories. The
players take turns, a step each.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sana_sprint.images import grid, to_pil
from sana_sprint.models.autoencoder import AutoencoderDC
from sana_sprint.models.text_encoder import PromptEmbeddings, PromptEncoder, load_text_encoder, load_tokenizer
from sana_sprint.models.transformer import CaptionContext, SanaTransformer2DModel
from sana_sprint.sampling import PUBLISHED_GUIDANCE, at_any_step, consistency, schedule
from sana_sprint.scheduler import SCMScheduler
from sana_sprint.train import distributed
from sana_sprint.train.cache.latents import latents_of_run
from sana_sprint.train.cache.trajectories import (
    CHUNK_SIZE,
    Traced,
    cached_trajectories,
    draw_starts,
    end_loss,
    trace,
    trajectory_settings,
)
from sana_sprint.train.config import StudentRun
from sana_sprint.train.data import channels_last
from sana_sprint.train.losses.adversarial import Adversary
from sana_sprint.train.losses.distribution_matching import Matching
from sana_sprint.train.losses.flow import guided
from sana_sprint.train.losses.scm import consistency_target, direction_norm, scm_loss
from sana_sprint.train.losses.tangent import make_tangent
from sana_sprint.train.metrics import by_level
from sana_sprint.train.models.student import Student, with_guidance
from sana_sprint.train.optim.optimizers import warmed_up
from sana_sprint.train.stages.base import Metrics, Part, Report, autocast
from sana_sprint.train.stages.captions import FlowModel, embed, frozen_embed, velocity_of
from sana_sprint.trigflow import (
    T_MAX,
    Denoiser,
    Velocity,
    add_noise,
    flow_denoiser,
    lognormal_times,
    to_clean,
    trig_to_flow,
)
from sana_sprint.weights import ModelIndex, load_model, resolve_folder, save_model, write_model_index

NUM_VALIDATION_CAPTIONS = 8


@dataclass(frozen=True)
class Batch:
    """Clean latents (B,C,H,W), the embeddings of their captions, guidance scales (B,), and what the teacher is told."""

    u0: Tensor
    captions: Sequence[str]
    instruction: bool  # whether the complex human instruction stands in front of them
    embeddings: PromptEmbeddings
    guidance: Tensor
    captioned: CaptionContext  # the teacher's
    indices: Tensor  # (B,), of the samples in the cache


class StudentStage:
    """See `stage.Stage`. The student starts equal to its teacher."""

    def __init__(self, config: StudentRun, *, report: Report) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.report = report
        self.device = distributed.device()
        self.folder = resolve_folder(str(config.teacher))
        text_encoder = load_text_encoder(self.folder / "text_encoder", device=self.device)
        text_encoder.requires_grad_(False)
        self.encoder = PromptEncoder(load_tokenizer(self.folder / "tokenizer"), text_encoder)
        self.autoencoder = channels_last(
            load_model(AutoencoderDC, self.folder / "vae", dtype=torch.float32, device=self.device)
        )
        self.cache, self.validation_captions = latents_of_run(
            config, self.autoencoder, num_validation=NUM_VALIDATION_CAPTIONS, report=report
        )
        self.embed = frozen_embed(config, self.encoder, self.cache.captions, report=report)
        self.teacher, self.transformer, learning = self.models()
        self.adversary = config.discriminator and Adversary(config.discriminator, self.teacher)
        self.matching = config.matching and Matching(config.matching, *self.follower())
        followers = (self.matching.follower,) if self.matching else ()
        for model in (self.teacher, self.transformer, *followers):
            # The teacher's too: the adversarial loss goes back through it.
            model.gradient_checkpointing = config.gradient_checkpointing
            # On a CPU the fused kernel's backward pass is slower than the plain one (docs/log.md).
            model.set_fused_attention(self.device.type != "cpu")
        self.tangent = make_tangent(config.tangent)
        self.student = Student(self.transformer, math.prod(self.cache.shape), learning).to(self.device)
        if self.adversary:
            self.adversary.discriminator.to(self.device)
        self.trajectories = config.trajectories and cached_trajectories(
            config.output.parent,
            config.trajectories,
            self._traced,
            settings=self.trajectory_settings,
            seed=config.seed,
            report=report,
        )

    def models(self) -> tuple[FlowModel, FlowModel, nn.Module]:
        """The teacher, the student, and what of the student learns."""
        teacher = self.load_transformer(self.folder)
        student = with_guidance(teacher).to(self.device)
        if self.config.start is not None:
            student.load_state_dict(
                self.load_transformer(resolve_folder(str(self.config.start))).state_dict()
            )
        return teacher, student, student

    def follower(self) -> tuple[FlowModel, nn.Module]:
        """The flow model that follows what the student draws, and what of it learns."""
        assert isinstance(self.teacher, SanaTransformer2DModel)
        follower = with_guidance(self.teacher).to(self.device)
        return follower, follower

    def load_transformer(self, folder: Path) -> SanaTransformer2DModel:
        """A pipeline folder's, frozen. fp32 under autocast: published weights are bf16, in which residuals and times lose bits."""
        transformer = load_model(
            SanaTransformer2DModel, folder / "transformer", dtype=torch.float32, device=self.device
        )
        return transformer.requires_grad_(False)

    @property
    def trajectory_settings(self) -> Sequence[object]:
        """What the teacher's trajectories depend on, beside their own settings."""
        assert isinstance(self.teacher, nn.Module)
        return trajectory_settings(self.config, self.cache.facts, self.encoder.text_encoder, self.teacher)

    @property
    def players(self) -> Mapping[str, nn.Module]:
        """The student and, where the run has these losses, the discriminator's heads and the follower."""
        players: dict[str, nn.Module] = {"student": self.student}
        if self.adversary:
            players["discriminator"] = self.adversary.discriminator
        if self.matching:
            players["follower"] = self.matching.learning
        return players

    @property
    def data(self) -> Mapping[str, str]:
        """The latents', and the trajectories'."""
        return {**self.cache.facts, **(self.trajectories.facts if self.trajectories else {})}

    def player(self, step: int) -> str:
        """All take turns; the student is first."""
        names = list(self.players)
        return names[step % len(names)]

    def loss(self, part: Part) -> tuple[Tensor, Metrics]:
        """The step's player's loss on its own batch."""
        with autocast(self.config):
            player = self.player(part.step)
            if player == "student":
                return self.student_loss(part)
            batch = self._batch_of(part)
            with torch.no_grad():
                student = self.denoiser(self._student_context(batch), batch.guidance)
                fake = self.pictures(student, batch.u0)
            if player == "discriminator":
                assert self.adversary
                return self.adversary.discriminator_loss(fake, batch.u0, batch.captioned)
            assert self.matching
            return self.matching.follower_loss(fake, self._followed(batch)), {}

    def context(
        self, model: FlowModel, embeds: Tensor, mask: Tensor | None, indices: Tensor | None
    ) -> CaptionContext:
        """What a model is told of embedded captions (B,L,D), and of the samples at these places of the cache if it is more.

        `indices` None stands for the validation samples.
        """
        assert isinstance(model, SanaTransformer2DModel)
        return model.encode_caption(embeds, mask)

    def validate(self, folder: Path, step: int) -> Metrics:
        """Pictures of fixed prompts from fixed noise: a row each at 1, 2 and 4 steps."""
        shape = (len(self.validation_captions), *self.cache.shape)
        with autocast(self.config):
            embeddings = embed(self.encoder, self.validation_captions, instruction=True)
            denoiser = self.denoiser(
                self.context(self.transformer, embeddings.embeds, embeddings.mask, None),
                torch.full((shape[0],), PUBLISHED_GUIDANCE, device=self.device),
            )
            rows = []
            for num_steps in (1, 2, 4):
                generator = torch.Generator().manual_seed(0)

                def draw(generator: torch.Generator = generator) -> Tensor:
                    return torch.randn(shape, generator=generator).to(self.device)

                latent = consistency(at_any_step(denoiser), draw(), schedule(num_steps), draw_noise=draw)
                rows.append(self.autoencoder.decode(latent / self.autoencoder.config.scaling_factor).float())
        folder.mkdir(parents=True, exist_ok=True)
        grid(to_pil(torch.cat(rows)), columns=shape[0]).save(folder / f"{step:08d}.png")
        (folder / "captions.txt").write_text("\n".join(self.validation_captions) + "\n", encoding="utf-8")
        return {"latent_rms": latent.square().mean().sqrt().item()}

    def export(self, folder: Path) -> None:
        """Writes a whole pipeline folder, weights in bf16."""
        assert isinstance(self.transformer, SanaTransformer2DModel)
        save_model(self.transformer, folder / "transformer", dtype=torch.bfloat16)
        for part in ("text_encoder", "tokenizer", "vae"):
            shutil.copytree(self.folder / part, folder / part, dirs_exist_ok=True)
        SCMScheduler().save_pretrained(folder / "scheduler")
        write_model_index(folder, sprint_index(type(self.encoder.tokenizer).__name__))

    def student_loss(self, part: Part) -> tuple[Tensor, Metrics]:
        """Weighted sum of what it learns of pictures and of trajectories; either may be absent."""
        loss, metrics = torch.zeros((), device=self.device), Metrics()
        if self.config.scm_weight or self.adversary or self.matching:
            loss, metrics = self.pictures_loss(self._batch_of(part), part.step)
        if self.trajectories:
            found = self._trajectory_loss(part)
            loss = loss + self.trajectories.config.weight * found
            metrics["trajectory_loss"] = found.item()
        return loss, metrics

    def pictures_loss(self, batch: Batch, step: int) -> tuple[Tensor, Metrics]:
        """Weighted sum of the losses on pictures; one of them may be absent."""
        context = self._student_context(batch)
        student, teacher = self.denoiser(context, batch.guidance), self.guided_velocity(batch)
        loss, metrics = torch.zeros((), device=self.device), Metrics()
        # First, because of what these compute only the student's pass is kept.
        if self.adversary or self.matching:
            with self._recomputing(self.config.recompute_pictures):
                fake = self.pictures(student, batch.u0)
        if self.adversary:
            adversarial = self.adversary.student_loss(fake, batch.captioned)
            loss = loss + self.adversary.config.weight * adversarial
            metrics["adversarial_loss"] = adversarial.item()
        if self.matching:
            with torch.no_grad():  # it says where to, and does not learn from that
                follower = self._followed(batch)
            matching = self.matching.student_loss(fake, teacher, follower)
            loss = loss + self.matching.weight(step) * matching
            metrics["matching_loss"] = matching.item()
        if self.config.scm_weight:
            warmup = warmed_up(step, self.config.tangent_warmup_steps)
            scm, found = self._scm_loss(student, teacher, context, batch, warmup)
            loss = loss + self.config.scm_weight * scm
            metrics |= found
        return loss, metrics

    def pictures(self, student: Denoiser, u0: Tensor) -> Tensor:
        """What the student draws in one step, a part of them from pure noise (max-time weighting): (B,C,H,W)."""
        t = self.draw_times(len(u0))
        t = torch.where(torch.rand(len(u0), device=t.device) < self.config.max_time_rate, T_MAX, t)
        u = add_noise(u0, torch.randn_like(u0), t)
        return to_clean(u, student(u, t).float(), t)

    @contextmanager
    def _recomputing(self, wanted: bool) -> Iterator[None]:
        """The student's passes inside keep no activations of its blocks, if that is wanted."""
        before = self.transformer.gradient_checkpointing
        self.transformer.gradient_checkpointing = before or wanted
        try:
            yield
        finally:
            self.transformer.gradient_checkpointing = before

    def _scm_loss(
        self, student: Denoiser, teacher: Velocity, context: CaptionContext, batch: Batch, warmup: float
    ) -> tuple[Tensor, Metrics]:
        t = self.draw_times(len(batch.u0))
        u = add_noise(batch.u0, torch.randn_like(batch.u0), t)
        with torch.no_grad():
            teacher_F = flow_denoiser(teacher)(u, t).float()
            tangent = self.tangent(self.transformer, context, u, t, teacher_F, batch.guidance)
        F = student(u, t).float()
        logvar = self.student.log_variance(t, batch.guidance)
        g = consistency_target(F.detach(), teacher_F, tangent, u, t, tangent_weight=warmup)
        loss, metrics = scm_loss(F, g, t, logvar)
        metrics["tangent_norm"] = tangent.flatten(1).norm(dim=1).mean().item()
        directions = direction_norm(g)
        metrics["direction_norm"] = directions.mean().item()
        return loss, {**metrics, **by_level("direction_norm", directions, trig_to_flow(t))}

    def _trajectory_loss(self, part: Part) -> Tensor:
        assert self.trajectories
        points = self.trajectories.draw(part.indices, batch_size=self.config.schedule.batch_size)
        u, t, guidance = (each.to(self.device) for each in (points.u, points.t, points.guidance))
        with torch.no_grad():
            embeddings = self.embed(points.captions, instruction=points.instruction)
        context = self.context(self.transformer, embeddings.embeds, embeddings.mask, points.indices)
        F = self.denoiser(context, guidance)(u, t).float()
        return end_loss(to_clean(u, F, t), points.end.to(self.device))

    @torch.no_grad()
    def _traced(self, indices: range) -> Traced:
        """The teacher's trajectories for these positions of the stream, the same whenever they are computed."""
        assert self.config.trajectories
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), autocast(self.config):
            torch.manual_seed(self.config.seed * 1_000_003 + indices.start)
            order = self.cache.shuffled(indices, batch_size=CHUNK_SIZE, seed=self.config.seed)
            batch = self._batch(order)
            t = draw_starts(len(order), self.config.trajectories.noise_rate).to(self.device)
            u = add_noise(batch.u0, torch.randn_like(batch.u0), t)
            velocity = self.guided_velocity(batch)
            points = trace(velocity, u, t, num_steps=self.config.trajectories.num_steps)
        return Traced(points, trig_to_flow(t), batch.guidance, order, batch.captions, batch.instruction)

    def draw_times(self, count: int) -> Tensor:
        """Angles of the consistency loss: (count,)."""
        return lognormal_times(
            count, mean=self.config.time_mean, std=self.config.time_std, device=self.device
        )

    def _batch_of(self, part: Part) -> Batch:
        batch_size = self.config.schedule.batch_size
        return self._batch(self.cache.shuffled(part.indices, batch_size=batch_size, seed=self.config.seed))

    @torch.no_grad()
    def _batch(self, order: Tensor) -> Batch:
        u0, captions = self.cache.batch(order)
        u0 = u0.to(self.device)
        scales = torch.tensor(self.config.guidance_scales)
        guidance = scales[torch.randint(len(scales), (len(u0),))].to(self.device)
        instruction = float(torch.rand(())) < self.config.instruction_rate
        embeddings = self.embed(captions, instruction=instruction)
        captioned = self.context(self.teacher, embeddings.embeds, embeddings.mask, order)
        return Batch(u0, captions, instruction, embeddings, guidance, captioned, order)

    def _student_context(self, batch: Batch) -> CaptionContext:
        return self.context(self.transformer, batch.embeddings.embeds, batch.embeddings.mask, batch.indices)

    def _followed(self, batch: Batch) -> Velocity:
        """What the student draws, as a flow."""
        assert self.matching
        follower = self.matching.follower
        context = self.context(follower, batch.embeddings.embeds, batch.embeddings.mask, batch.indices)
        return velocity_of(follower, context, batch.guidance)

    def guided_velocity(self, batch: Batch) -> Velocity:
        """The guided teacher. Guidance is affine in the velocity, so it is the same before and after the transform."""
        # Here, because the other players' steps have no use for it. Bos alone is the empty prompt.
        uncaptioned = self.context(self.teacher, batch.embeddings.embeds[:, :1], None, batch.indices)
        return guided(
            velocity_of(self.teacher, batch.captioned),
            velocity_of(self.teacher, uncaptioned),
            batch.guidance,
            projected=self.config.guidance_projected,
            limit=self.config.guidance_limit,
            start=self.config.guidance_from,
        )

    def denoiser(self, context: CaptionContext, guidance: Tensor) -> Denoiser:
        """The student, told its context and the guidance scales (B,)."""
        return flow_denoiser(velocity_of(self.transformer, context, guidance))


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
