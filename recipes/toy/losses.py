"""Compares the losses in the plane at equal compute: `python -m recipes.toy.losses`. Prints a Markdown table.

Every run has the same student, batch and seconds of one thread's processor time, and the library's loss functions. Discriminators and
fake-score models are networks of the student's size; their updates count. The teacher is the exact velocity, which costs little.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from statistics import mean, stdev

import torch
from torch import Tensor, nn

from recipes.toy import world
from recipes.toy.distil import (
    BATCH,
    LEARNING_RATE,
    TIME_MEAN,
    TIME_STD,
    WARMUP_STEPS,
    WIDTH,
    Measured,
    Student,
    measure,
)
from sana_sprint.train.losses.adversarial import hinge_discriminator, hinge_generator
from sana_sprint.train.losses.distribution_matching import direction
from sana_sprint.train.losses.f_divergence import factors_of
from sana_sprint.train.losses.flow import flow_loss, logit_normal_times
from sana_sprint.train.losses.scm import consistency_target, scaled_tangent, scm_loss
from sana_sprint.train.losses.trajectories import end_loss
from sana_sprint.train.losses.twinflow import consistency_error, rectification, twin_loss
from sana_sprint.trigflow import (
    T_MAX,
    Velocity,
    add_noise,
    flow_to_trig,
    lognormal_times,
    to_clean,
    trig_to_flow,
)

SEEDS = 3
SECONDS = 30.0  # of one thread's processor time, for each run
NUM_PATHS = 20_000  # that the trajectories' loss visits; computed before, as in the product
JUDGES_BETAS = (0.0, 0.99)  # of a discriminator's Adam, as in the released recipes
JUDGING_MEAN = -1.0  # of the adversarial loss's angles, tau ~ N(mean, 1)

Update = Callable[[int], None]


class Run:
    """A student and its optimiser. `update` takes a loss; learning rates fall linearly over the budget."""

    def __init__(self) -> None:
        self.student = Student()
        self._optimizers: list[tuple[torch.optim.Optimizer, float]] = []
        self._students = self.optimizer(self.student)
        self.progress = 0.0

    def optimizer(
        self, module: nn.Module, rate: float = LEARNING_RATE, betas: tuple[float, float] = (0.9, 0.999)
    ) -> torch.optim.Optimizer:
        """An Adam whose rate falls with `progress`."""
        made = torch.optim.Adam(module.parameters(), lr=rate, betas=betas)
        self._optimizers.append((made, rate))
        return made

    def update(self, loss: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
        """One step of an optimiser, the student's if none is given."""
        for each, rate in self._optimizers:
            each.param_groups[0]["lr"] = rate * (1 - self.progress)
        chosen = self._students if optimizer is None else optimizer
        chosen.zero_grad()
        loss.backward()
        chosen.step()

    def pictures(self) -> Tensor:
        """One-step points (B,2), half of them from pure noise."""
        t = lognormal_times(BATCH, mean=TIME_MEAN, std=TIME_STD)
        t = torch.where(torch.rand(BATCH) < 0.5, T_MAX, t)
        u = add_noise(world.draw(BATCH), torch.randn(BATCH, 2), t)
        return to_clean(u, self.student(u, t), t)


def velocity_of(student: nn.Module) -> Velocity:
    """A student F(u,t) as a flow velocity v(x,s); negative flow times are negative angles."""

    def velocity(x: Tensor, flow_t: Tensor) -> Tensor:
        t = flow_to_trig(flow_t.abs())
        cos, sin = torch.cos(t)[:, None], torch.sin(t)[:, None]
        u = x * (cos + sin)
        found: Tensor = (cos + sin) * student(u, t * flow_t.sign()) - (cos - sin) * u
        return found

    return velocity


def teacher(x: Tensor, flow_t: Tensor) -> Tensor:
    """The exact velocity."""
    return world.velocity(x.double(), flow_t.double()).float()


def judge_of() -> nn.Sequential:
    """Logits of noised points u and their angle: (B,3) -> (B,1)."""
    return nn.Sequential(
        *(nn.Linear(3, WIDTH), nn.LeakyReLU(0.2)),
        *(nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.2)),
        nn.Linear(WIDTH, 1),
    )


# ----- the losses: each makes the function of one update ---------------------------------------------------------------


def scm(run: Run) -> Update:
    """The consistency loss."""

    def update(step: int) -> None:
        t = lognormal_times(BATCH, mean=TIME_MEAN, std=TIME_STD)
        u = add_noise(world.draw(BATCH), torch.randn(BATCH, 2), t)
        teacher_F = world.teacher(u, t)
        tangent = scaled_tangent(run.student, u, t, teacher_F)
        F = run.student(u, t)
        warmup = min(1.0, step / WARMUP_STEPS)
        g = consistency_target(F.detach(), teacher_F, tangent, u, t, tangent_weight=warmup)
        run.update(scm_loss(F, g, t, run.student.logvar(t))[0])

    return update


def adversarial(run: Run) -> Update:
    """The adversarial loss: hinge, on noised points."""
    judge = judge_of()
    optimizer = run.optimizer(judge, betas=JUDGES_BETAS)

    def update(step: int) -> None:
        t = lognormal_times(BATCH, mean=JUDGING_MEAN, std=1.0)
        fake = run.pictures()
        if step % 2:
            real = _judged(judge, world.draw(BATCH), t)
            loss, _ = hinge_discriminator(real, _judged(judge, fake.detach(), t))
            run.update(loss, optimizer)
        else:
            run.update(hinge_generator(_judged(judge, fake, t)))

    return update


def both(run: Run) -> Update:
    """sCM and the adversarial loss in turn, the paper's hybrid."""
    first, second = scm(run), adversarial(run)
    return lambda step: first(step // 3) if step % 3 == 0 else second(step // 3 * 2 + step % 3 - 1)


def matching(run: Run, divergence: str | None = None) -> Update:
    """Distribution matching with a fake-score model; with a divergence, weighed by a discriminator."""
    fake_model, judge = Student(), judge_of()
    optimizer, judges = run.optimizer(fake_model), run.optimizer(judge, betas=JUDGES_BETAS)

    def update(step: int) -> None:
        fake, noise = run.pictures(), torch.randn(BATCH, 2)
        flow_t = logit_normal_times(BATCH, mean=0.0, std=1.2)
        if step % 3:
            run.update(flow_loss(velocity_of(fake_model), fake.detach(), noise, flow_t).mean(), optimizer)
            return
        if divergence is not None:
            t = lognormal_times(BATCH, mean=JUDGING_MEAN, std=1.0)
            real = _judged(judge, world.draw(BATCH), t)
            run.update(hinge_discriminator(real, _judged(judge, fake.detach(), t))[0], judges)
        with torch.no_grad():
            move = direction(fake, noise, flow_t, teacher, velocity_of(fake_model))
            s = flow_t[:, None]
            noised, t = (1 - s) * fake + s * noise, flow_to_trig(flow_t)
            factors = torch.ones(BATCH)
            if divergence is not None:
                scale = (torch.cos(t) + torch.sin(t))[:, None]
                logits = judge(torch.cat([noised * scale, t[:, None]], 1)).squeeze(1)
                factors = factors_of(logits, divergence)  # type: ignore[arg-type]
        run.update(((fake - (fake - move).detach()).square().sum(1) * factors).mean() / 2)

    return update


def trajectories(run: Run) -> Update:
    """Regression on the ends of the exact teacher's paths, from any of their points."""
    noise = torch.randn(NUM_PATHS, 2, dtype=torch.float64)
    top = torch.full((NUM_PATHS,), T_MAX, dtype=torch.float64)
    points = torch.stack(world.follow(world.teacher, noise, top, num_steps=16)).float()

    def update(step: int) -> None:
        row, k = torch.randint(NUM_PATHS, (BATCH,)), torch.randint(16, (BATCH,))
        t = T_MAX * (1 - k / 16)
        u, end = points[k, row], points[-1, row]
        run.update(end_loss(to_clean(u, run.student(u, t), t), end))

    return update


def twinflow(run: Run) -> Update:
    """TwinFlow."""
    average = copy.deepcopy(run.student).requires_grad_(False)

    def update(step: int) -> None:
        for old, live in zip(average.parameters(), run.student.parameters(), strict=True):
            old.data.lerp_(live.data, 1 - min(0.99, (1 + step) / (10 + step)))
        student = velocity_of(run.student)
        flow_t = trig_to_flow(lognormal_times(BATCH, mean=TIME_MEAN, std=TIME_STD))
        s = flow_t[:, None]
        x = (1 - s) * world.draw(BATCH) + s * torch.randn(BATCH, 2)
        found = student(x, flow_t)
        with torch.no_grad():
            error = consistency_error(found, x, flow_t, teacher(x, flow_t), velocity_of(average), 0.01)
        loss = (found - (found - error).detach()).square().mean()
        fake = run.pictures()
        times = logit_normal_times(BATCH, mean=0.0, std=1.2)
        loss = loss + twin_loss(student, fake.detach(), torch.randn(BATCH, 2), times)
        weight = min(1.0, step / WARMUP_STEPS)
        with torch.no_grad():
            move = rectification(fake, torch.randn(BATCH, 2), times, teacher, student)
        run.update(loss + weight * (fake - (fake + move).detach()).square().mean())

    return update


def _judged(judge: nn.Module, clean: Tensor, t: Tensor) -> Tensor:
    noised = add_noise(clean, torch.randn_like(clean), t)
    out: Tensor = judge(torch.cat([noised, t[:, None]], 1))
    return out


LOSSES: dict[str, Callable[[Run], Update]] = {
    "sCM": scm,
    "adversarial (LADD)": adversarial,
    "sCM + adversarial": both,
    "distribution matching": matching,
    "f-distill, Jensen-Shannon": lambda run: matching(run, "jensen-shannon"),
    "f-distill, forward KL": lambda run: matching(run, "forward-kl"),
    "trajectories": trajectories,
    "TwinFlow": twinflow,
}


def train(make: Callable[[Run], Update], seed: int, seconds: float) -> tuple[int, Measured]:
    """Updates within the budget, and the student's measurements."""
    torch.manual_seed(seed)
    run = Run()
    update = make(run)  # what is computed once, before training, is not in the budget
    step = 0
    for run.progress in _progress(seconds):
        update(step)
        step += 1
    torch.manual_seed(1_000)
    return step, measure(run.student)


def _progress(seconds: float) -> Iterator[float]:
    """The used share of the budget of processor time, until it is used up."""
    started = time.process_time()
    while (used := (time.process_time() - started) / seconds) < 1:
        yield used


def main() -> None:
    """Prints a row for each loss: mean and standard deviation over seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--only", action="append", help="a loss by its name in the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| loss | updates | 1 step: W2 | 2 steps: W2 | 1 step: distance from the exact end |\n|---|---|---|---|---|"
    )
    for name, make in LOSSES.items():
        if arguments.only and name not in arguments.only:
            continue
        found = [train(make, seed, arguments.seconds) for seed in range(arguments.seeds)]
        columns = (
            [each.one_step for _, each in found],
            [each.two_steps for _, each in found],
            [each.error for _, each in found],
        )
        cells = [f"{mean(column):.3f} ± {stdev(column) if len(column) > 1 else 0:.3f}" for column in columns]
        print(f"| {name} | {round(mean(steps for steps, _ in found))} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
