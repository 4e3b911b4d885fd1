"""Regression on the ends of the guided teacher's trajectories.

All points of a trajectory have one clean picture, its end: that is the definition of a consistency function. The consistency
loss learns it from the function's own derivative; here it is regressed on directly (knowledge distillation, arXiv 2101.02388,
from every point of the path). SANA-Sprint has no such loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from sana_sprint.train.cache.trajectories import (
    CHUNK_SIZE,
    Traced,
    Trajectories,
    TrajectoriesConfig,
    cached_trajectories,
    draw_starts,
    trace,
)
from sana_sprint.train.losses.base import Loss
from sana_sprint.train.metrics import Metrics
from sana_sprint.train.models.base import velocity_of
from sana_sprint.train.sections import Section
from sana_sprint.trigflow import add_noise, flow_denoiser, to_clean, trig_to_flow

if TYPE_CHECKING:
    from sana_sprint.train.distillation import Batch, Distillation


class TrajectoryRegression(Loss):
    """The distance of the student's one-step pictures from the ends of stored trajectories."""

    Config = TrajectoriesConfig

    def __init__(self, trajectories: Trajectories) -> None:
        self.trajectories = trajectories
        self.facts = trajectories.facts

    @classmethod
    def make(cls, distillation: Distillation, section: Section | None) -> Self | None:
        """With trajectories from the cache beside the run's output, computed where they are missing."""
        if not isinstance(section, TrajectoriesConfig):
            return None
        config = distillation.config
        trajectories = cached_trajectories(
            config.output.parent,
            section,
            lambda indices: _trace(distillation, section, indices),
            settings=distillation.models.trajectory_settings(),
            seed=config.seed,
            report=distillation.report,
        )
        return cls(trajectories)

    def student(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The weighted `end_loss` at points of its own; the batch's samples are not used."""
        d = batch.distillation
        points = self.trajectories.draw(batch.part.indices, batch_size=d.config.schedule.batch_size)
        u, t, guidance = (each.to(d.device) for each in (points.u, points.t, points.guidance))
        with torch.no_grad():
            embeddings = d.embed(points.captions, instruction=points.instruction)
        student = d.models.student
        context = d.models.context(student, embeddings.embeds, embeddings.mask, points.indices)
        F = flow_denoiser(velocity_of(student, context, guidance))(u, t).float()
        loss = end_loss(to_clean(u, F, t), points.end.to(d.device))
        return self.trajectories.config.weight * loss, {"trajectory_loss": loss.item()}


@torch.no_grad()
def _trace(distillation: Distillation, section: TrajectoriesConfig, indices: range) -> Traced:
    """The teacher's trajectories for these positions of the stream, the same whenever they are computed."""
    with distillation.seeded(indices.start):
        order = distillation.cache.shuffled(indices, batch_size=CHUNK_SIZE, seed=distillation.config.seed)
        samples = distillation.samples(order)
        t = draw_starts(len(order), section.noise_rate).to(distillation.device)
        u = add_noise(samples.u0, torch.randn_like(samples.u0), t)
        points = trace(distillation.guided_teacher(samples), u, t, num_steps=section.num_steps)
    return Traced(points, trig_to_flow(t), samples.guidance, order, samples.captions, samples.instruction)


def end_loss(clean: Tensor, end: Tensor) -> Tensor:
    """The distance of the student's clean estimates from their trajectories' ends (B,C,H,W), mean over samples.

    The norm and not its square: where a path is not decided yet, the student goes to one of the ends rather than
    between them, and no sample outweighs another. As the other losses' its gradient by a picture has a norm of 1.
    """
    return (clean - end).square().flatten(1).sum(1).add(1e-6).sqrt().mean()
