"""Every loss of the library in the plane, at equal compute: `python -m recipes.toy.losses`.

Compute is counted in forward passes of a network of the student's size over one batch: a backward pass counts 2, a forward-mode
derivative 2, the exact teacher 1. A method is a stream of turns, each the loss of one network and its passes.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from recipes.toy import world
from recipes.toy.distil import (
    BATCH,
    LEARNING_RATE,
    TIME_MEAN,
    TIME_STD,
    Student,
    measure,
    one_step,
)
from recipes.toy.plots import dots, save
from sana_sprint.train.cache.trajectories import trace
from sana_sprint.train.losses.adversarial import (
    hinge_discriminator,
    hinge_generator,
    logistic_discriminator,
    logistic_generator,
)
from sana_sprint.train.losses.distribution_matching import direction
from sana_sprint.train.losses.f_divergence import Divergence, factors_of
from sana_sprint.train.losses.flow import flow_loss, logit_normal_times
from sana_sprint.train.losses.scm import consistency_target, scaled_tangent, scm_loss
from sana_sprint.train.losses.trajectories import end_loss
from sana_sprint.train.losses.twinflow import consistency_error, rectification, twin_loss
from sana_sprint.trigflow import (
    T_MAX,
    Velocity,
    add_noise,
    expand_like,
    flow_to_trig,
    lognormal_times,
    to_clean,
    trig_to_flow,
)

PASSES = 3000  # 500 updates of the consistency loss
FLOW_UPDATES = 500
NUM_POINTS = 1500  # of a panel
WARMUP = 0.1  # part of the compute over which parts of losses warm up
JUDGED_MEAN, JUDGED_STD = -0.6, 1.0  # angles at which a discriminator judges
PATH_STEPS, PATHS_SHARE = 40, 0.2  # Euler steps of a trajectory, and the part of the compute spent on them
TIME_BINS = 10  # of f-distill
STRAY = (
    4 * world.SPOT_STD
)  # a point farther from every spot's mean than this is between spots: 1 in 3,000 of the data


@dataclass(frozen=True)
class Turn:
    """The loss of one network, and the passes that it took."""

    module: nn.Module
    loss: Tensor
    passes: float


@dataclass
class Progress:
    """A budget in passes, and the part of it that is spent, from 0 to 1; and the flow network that a fake-score model starts as."""

    passes: float
    spent: float = 0.0
    flow: Student = field(default_factory=Student)

    @property
    def warm(self) -> float:
        """Grows from 0 to 1 over the warm-up."""
        return min(1.0, self.spent / WARMUP)


Method = Callable[[Student, Progress], Iterator[Turn]]


class Judge(nn.Module):
    """A discriminator of noised points: as large as the student."""

    def __init__(self) -> None:
        super().__init__()
        self.student = Student()
        self.leave = nn.Linear(2, 1)

    def forward(self, u: Tensor, t: Tensor) -> Tensor:
        """Logits (B,1)."""
        return self.leave(self.student(u, t))


def velocity_of(student: nn.Module) -> Velocity:
    """F as a velocity in flow space, at negative flow time too: the network then gets the angle's negative.

    The change of variables is that of the time's size, so that nothing is singular.
    """

    def velocity(x: Tensor, flow_t: Tensor) -> Tensor:
        t = flow_to_trig(flow_t.abs())
        cos, sin = expand_like(t.cos(), x), expand_like(t.sin(), x)
        u = (cos + sin) * x
        return (cos + sin) * student(u, t * flow_t.sign()) - (cos - sin) * u

    return velocity


def draw_times() -> Tensor:
    """Angles of the consistency losses."""
    return lognormal_times(BATCH, mean=TIME_MEAN, std=TIME_STD)


def fakes(student: Student) -> Tensor:
    """The student's points, half of them from pure noise: one pass."""
    t = torch.where(torch.rand(BATCH) < 0.5, T_MAX, draw_times())
    u = add_noise(world.draw(BATCH), torch.randn(BATCH, 2), t)
    return to_clean(u, student(u, t), t)


def scm(student: Student, progress: Progress) -> tuple[Tensor, float]:
    """The continuous-time consistency loss."""
    t = draw_times()
    u = add_noise(world.draw(BATCH), torch.randn(BATCH, 2), t)
    teacher_F = world.teacher(u, t)
    tangent = scaled_tangent(student, u, t, teacher_F)
    F = student(u, t)
    g = consistency_target(F.detach(), teacher_F, tangent, u, t, tangent_weight=progress.warm)
    return scm_loss(F, g, t, student.logvar(t))[0], 6


def consistency(student: Student, progress: Progress) -> Iterator[Turn]:
    """sCM alone."""
    while True:
        yield Turn(student, *scm(student, progress))


def judged(judge: Judge, points: Tensor) -> Tensor:
    """Logits of noised points."""
    t = lognormal_times(len(points), mean=JUDGED_MEAN, std=JUDGED_STD)
    return judge(add_noise(points, torch.randn_like(points), t), t)


def adversarial(student: Student, progress: Progress, *, scm_weight: float) -> Iterator[Turn]:
    """LADD's losses, with a discriminator of its own instead of heads on the teacher; beside sCM or alone."""
    judge = Judge()
    while True:
        loss, passes = 0.5 * hinge_generator(judged(judge, fakes(student))), 6.0
        if scm_weight:
            other, more = scm(student, progress)
            loss, passes = loss + scm_weight * other, passes + more
        yield Turn(student, loss, passes)
        yield Turn(judge, judge_loss(judge, student, hinge_discriminator), 7)


def judge_loss(
    judge: Judge, student: Student, loss: Callable[[Tensor, Tensor], tuple[Tensor, object]]
) -> Tensor:
    """Of data and of the student's points."""
    with torch.no_grad():
        fake = fakes(student)
    return loss(judged(judge, world.draw(BATCH)), judged(judge, fake))[0]


def matching(
    student: Student,
    progress: Progress,
    *,
    scm_weight: float = 0.0,
    divergence: Divergence | None = None,
    gan_weight: float = 0.0,
    fake_turns: int = 1,
) -> Iterator[Turn]:
    """Distribution matching, by an f-divergence or the reverse KL one, beside sCM or a logistic GAN loss or neither."""
    fake_model, judge = copy.deepcopy(progress.flow), Judge()
    while True:
        fake = fakes(student)
        flow_t, noise = logit_normal_times(BATCH, mean=0.0, std=1.2), torch.randn(BATCH, 2)
        with torch.no_grad():
            toward = direction(fake, noise, flow_t, world.velocity, velocity_of(fake_model))
            passes = 5.0
            if divergence is not None:
                t = flow_to_trig(flow_t)
                noised = add_noise(fake, noise, t)
                factors = factors_of(judge(noised, t).squeeze(1), flow_t, divergence, time_bins=TIME_BINS)
                toward = toward * factors[:, None]
                passes += 1
        loss = progress.warm * (fake - (fake - toward).detach()).square().sum(1).mean() / 2
        if gan_weight:
            loss = loss + progress.warm * gan_weight * logistic_generator(judged(judge, fake))
            passes += 3
        if scm_weight:
            other, more = scm(student, progress)
            loss, passes = loss + scm_weight * other, passes + more
        yield Turn(student, loss, passes)
        if gan_weight:
            yield Turn(judge, judge_loss(judge, student, logistic_discriminator), 7)
        for _ in range(fake_turns):
            with torch.no_grad():
                fake = fakes(student)
            flow_t = logit_normal_times(BATCH, mean=0.0, std=1.2)
            loss = flow_loss(velocity_of(fake_model), fake, torch.randn_like(fake), flow_t).mean()
            yield Turn(fake_model, loss, 4)


def trajectories(student: Student, progress: Progress) -> Iterator[Turn]:
    """Regression on the ends of stored paths of the teacher, half of them from pure noise."""
    count = round(PATHS_SHARE * progress.passes / PATH_STEPS) * BATCH
    start = torch.where(torch.rand(count) < 0.5, T_MAX, lognormal_times(count, mean=TIME_MEAN, std=TIME_STD))
    u = add_noise(world.draw(count), torch.randn(count, 2), start)
    paths = trace(world.velocity, u, start, num_steps=PATH_STEPS).float()
    progress.spent += PATHS_SHARE
    while True:
        which = torch.randint(count, (BATCH,))
        place = torch.where(torch.rand(BATCH) < 0.3, 0, torch.randint(PATH_STEPS, (BATCH,)))
        t = flow_to_trig(trig_to_flow(start[which]) * (1 - place / PATH_STEPS))
        u = paths[which, place] * (t.cos() + t.sin())[:, None]
        yield Turn(student, end_loss(to_clean(u, student(u, t), t), paths[which, -1]), 3)


def twinflow(student: Student, progress: Progress, *, twin: bool) -> Iterator[Turn]:
    """TwinFlow's three terms, or its consistency term alone."""
    target, step = Student(), 0
    target.load_state_dict(student.state_dict())
    target.requires_grad_(False)
    velocity = velocity_of(student)
    while True:
        for average, live in zip(target.parameters(), student.parameters(), strict=True):
            average.lerp_(live.detach(), 1 - min(0.99, (1 + step) / (10 + step)))
        step += 1
        s = trig_to_flow(draw_times())
        x = (1 - s)[:, None] * world.draw(BATCH) + s[:, None] * torch.randn(BATCH, 2)
        found = velocity(x, s)
        with torch.no_grad():
            error = consistency_error(found, x, s, world.velocity(x, s), velocity_of(target), 0.01)
        loss, passes = (found - (found - error).detach()).square().mean(), 5.0
        if twin:
            fake = fakes(student)
            times = partial(logit_normal_times, BATCH, mean=0.0, std=1.2)
            loss = loss + twin_loss(velocity, fake.detach(), torch.randn(BATCH, 2), times())
            with torch.no_grad():
                move = rectification(fake, torch.randn(BATCH, 2), times(), world.velocity, velocity)
            loss = loss + progress.warm * (fake - (fake + move).detach()).square().mean()
            passes += 8
        yield Turn(student, loss, passes)


METHODS: dict[str, Method] = {
    "sCM": consistency,
    "TwinFlow, consistency term": partial(twinflow, twin=False),
    "TwinFlow": partial(twinflow, twin=True),
    "trajectories": trajectories,
    "LADD": partial(adversarial, scm_weight=0.0),
    "sCM and LADD": partial(adversarial, scm_weight=1.0),
    "matching": matching,
    "matching, 5 fake-score turns": partial(matching, fake_turns=5),
    "sCM and matching": partial(matching, scm_weight=1.0),
    "matching and GAN": partial(matching, gan_weight=0.1, fake_turns=5),
    "f-distill, Jensen-Shannon": partial(matching, divergence="jensen-shannon", gan_weight=0.1, fake_turns=5),
    "f-distill, forward KL": partial(matching, divergence="forward-kl", gan_weight=0.1, fake_turns=5),
}


def flow_network(*, updates: int = FLOW_UPDATES) -> Student:
    """A network that has learnt the data's flow, as a picture model's teacher has."""
    flow = Student()
    optimizer = torch.optim.Adam(flow.parameters(), lr=LEARNING_RATE)
    for _ in range(updates):
        times = logit_normal_times(BATCH, mean=0.0, std=1.2)
        loss = flow_loss(velocity_of(flow), world.draw(BATCH), torch.randn(BATCH, 2), times).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return flow


def distil(
    method: Method, *, passes: float = PASSES, start: tuple[Student, Student] | None = None
) -> Student:
    """Trains a student until the compute is spent, from torch's global generator. All rates fall to 0.

    `start` is a student that goes on, at half the rate, and a flow network; without it both are new.
    """
    if start is None:
        student, progress, rate = Student(), Progress(passes), LEARNING_RATE
    else:
        student, progress = copy.deepcopy(start[0]), Progress(passes, flow=start[1])
        rate = LEARNING_RATE / 2
    optimizers: dict[nn.Module, torch.optim.Adam] = {}
    for turn in method(student, progress):
        if progress.spent >= 1:
            break
        if turn.module not in optimizers:
            betas = (0.0, 0.99) if isinstance(turn.module, Judge) else (0.9, 0.999)
            optimizers[turn.module] = torch.optim.Adam(turn.module.parameters(), betas=betas)
        optimizer = optimizers[turn.module]
        optimizer.param_groups[0]["lr"] = rate * (1 - progress.spent)
        optimizer.zero_grad()
        gradients = torch.autograd.grad(turn.loss, list(turn.module.parameters()), allow_unused=True)
        for parameter, gradient in zip(turn.module.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        progress.spent += turn.passes / passes
    return student


@torch.no_grad()
def scores(student: Student, *, count: int = 2000) -> dict[str, float]:
    """Distances and errors of `distil.measure`, the part of stray points, and the rarest spot's share of an equal one."""
    found = measure(student, count=count)
    torch.manual_seed(2)
    points = one_step(student, torch.randn(count, 2))
    distance, spot = torch.cdist(points.double(), world.SPOTS).min(1)
    shares = torch.bincount(spot, minlength=world.NUM_SPOTS) / count * world.NUM_SPOTS
    return {
        "1 step": found.one_step,
        "2 steps": found.two_steps,
        "error": found.error,
        "stray": (distance > STRAY).double().mean().item(),
        "rarest": shares.min().item(),
    }


def main() -> None:
    """Prints a table: each method's mean over seeds and, in brackets, its worst seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=Path("docs/images/toy-losses.png"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--passes", type=float, default=PASSES)
    parser.add_argument("--only", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--go-on", action="store_true", help="from a student that had as much sCM, and a flow network"
    )
    arguments = parser.parse_args()
    starts: list[tuple[Student, Student] | None] = [None] * arguments.seeds
    if arguments.go_on:
        for seed in range(arguments.seeds):
            torch.manual_seed(seed)
            starts[seed] = distil(METHODS["sCM"], passes=arguments.passes), flow_network()
    print("| loss | 1 step | 2 steps | error | stray | rarest |\n|---|---|---|---|---|---|")
    panels = [dots("data", world.draw(NUM_POINTS))]
    for name in arguments.only:
        runs = []
        for seed, start in enumerate(starts):
            torch.manual_seed(seed)
            student = distil(METHODS[name], passes=arguments.passes, start=start)
            runs.append(scores(student))
            if seed == 0:
                panels.append(dots(name, one_step(student, torch.randn(NUM_POINTS, 2))))
        cells = []
        for key in runs[0]:
            values = torch.tensor([run[key] for run in runs], dtype=torch.float64)
            worst = values.min() if key == "rarest" else values.max()
            cells.append(f"{values.mean():.3f} ({worst:.3f})")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    save(panels, arguments.file, columns=4)


if __name__ == "__main__":
    main()
