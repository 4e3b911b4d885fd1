"""Trains a small student of the exact teacher with the library's losses and measures its error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recipes.toy import world
from sana_sprint.sampling import at_any_step, consistency
from sana_sprint.train.losses.scm import consistency_target, scaled_tangent, scm_loss
from sana_sprint.trigflow import T_MAX, add_noise, lognormal_times, to_clean

WIDTH = 128
NUM_STEPS = 1000
BATCH = 512
LEARNING_RATE = 2e-3
WARMUP_STEPS = 200  # of the tangent
# The spots separate where noise and spots are equally wide, at tan t = 0.3 or tau = ln(0.15) = -1.9: most angles are
# drawn between there and pi/2.
TIME_MEAN, TIME_STD = -1.0, 1.6
TWO_STEPS = [T_MAX, 1.1, 0.0]

Target = Callable[..., Tensor]  # `consistency_target`, or a broken one
OnStep = Callable[[int, "Student"], None]


class Student(nn.Module):
    """F(u,t) as a network with three hidden layers, and the loss's log variance as a linear map of the angle's features."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Linear(5, WIDTH), nn.SiLU()),
            *(nn.Linear(WIDTH, WIDTH), nn.SiLU()),
            *(nn.Linear(WIDTH, WIDTH), nn.SiLU()),
            nn.Linear(WIDTH, 2),
        )
        self.log_variance = nn.Linear(3, 1)

    def forward(self, u: Tensor, t: Tensor) -> Tensor:
        """F (B,2) for u (B,2) and t (B,)."""
        return self.net(torch.cat([u, _features(t)], dim=1))

    def logvar(self, t: Tensor) -> Tensor:
        """The loss's log variance at each angle, (B,)."""
        return self.log_variance(_features(t)).squeeze(1)


def _features(t: Tensor) -> Tensor:
    """Slow functions of the angle only: with faster ones dF/dt grows, and distillation with it becomes unstable."""
    return torch.stack([t, (2 * t).sin(), (2 * t).cos()], dim=1)


def distil(
    *, num_steps: int = NUM_STEPS, target: Target = consistency_target, on_step: OnStep | None = None
) -> Student:
    """Trains a student on `num_steps` batches, from torch's global generator; `on_step` gets (step, student)."""
    student = Student()
    optimizer = torch.optim.Adam(student.parameters(), lr=LEARNING_RATE)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=num_steps)
    for step in range(num_steps):
        t = lognormal_times(BATCH, mean=TIME_MEAN, std=TIME_STD)
        u = add_noise(world.draw(BATCH), torch.randn(BATCH, 2), t)
        teacher_F = world.teacher(u, t)
        tangent = scaled_tangent(student, u, t, teacher_F)
        F = student(u, t)
        warmup = min(1.0, step / WARMUP_STEPS)
        g = target(F.detach(), teacher_F, tangent, u, t, tangent_weight=warmup)
        loss, _ = scm_loss(F, g, t, student.logvar(t))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        if on_step:
            on_step(step, student)
    return student


@dataclass(frozen=True)
class Measured:
    """Sliced 2-Wasserstein distances from the data, and the student's distance from the exact consistency function.

    `error` is the root mean square distance between the student's one-step points and the exact ends of the paths from
    the same noise. Those ends are distributed as the data, so it is also an upper bound of the student's (unsliced)
    2-Wasserstein distance from the data.
    """

    floor: float  # between two sets of data
    one_step: float
    two_steps: float
    teacher: float  # of the teacher used as if it were a student: one step of F
    error: float
    error_midway: float  # the same at noisy data, angles even in [0, pi/2]


@torch.no_grad()
def measure(student: Student, *, count: int = 4000, seed: int = 1) -> Measured:
    """Measures a student on `count` points."""
    torch.manual_seed(seed)
    data, noise, top = world.draw(count), torch.randn(count, 2), torch.full((count,), T_MAX)
    first = one_step(student, noise)
    t = T_MAX * torch.rand(count)
    u = add_noise(data, torch.randn(count, 2), t)
    return Measured(
        floor=sliced_wasserstein(world.draw(count), data),
        one_step=sliced_wasserstein(first, data),
        two_steps=sliced_wasserstein(few_steps(student, noise), data),
        teacher=sliced_wasserstein(to_clean(noise, world.teacher(noise, top), top), data),
        error=_distance(first, world.exact(noise, top)),
        error_midway=_distance(to_clean(u, student(u, t), t), world.exact(u, t)),
    )


@torch.no_grad()
def one_step(student: Student, noise: Tensor) -> Tensor:
    """One-step samples (B,2) from noise (B,2)."""
    top = torch.full((len(noise),), T_MAX)
    return to_clean(noise, student(noise, top), top)


@torch.no_grad()
def few_steps(student: Student, noise: Tensor) -> Tensor:
    """Two-step samples (B,2) from noise (B,2)."""
    return consistency(at_any_step(student), noise, TWO_STEPS, draw_noise=lambda: torch.randn_like(noise))


def sliced_wasserstein(a: Tensor, b: Tensor, *, num_directions: int = 64) -> float:
    """The 2-Wasserstein distance between equally many points (n,2), sliced: sqrt(2 mean over directions of W2^2 on a line).

    On a line the best matching is the sorted one. The 2 is the plane's dimension: with it, shifting one set by d gives
    |d|, as the unsliced distance does.
    """
    angles = math.pi / num_directions * torch.arange(num_directions)
    directions = torch.stack([angles.cos(), angles.sin()])
    difference = (a @ directions).sort(0).values - (b @ directions).sort(0).values
    return math.sqrt(2 * difference.square().mean().item())


def _distance(a: Tensor, b: Tensor) -> float:
    return (a - b).square().sum(1).mean().sqrt().item()
