"""Distribution matching: its direction where the answer is known, what learns, and a student that goes on from a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from sana_sprint.train.losses.distribution_matching import DistributionMatching, MatchingConfig, direction
from sana_sprint.train.stages.base import Part
from sana_sprint.train.stages.student import load_transformer
from sana_sprint.train.trainer import Trainer
from sana_sprint.trigflow import Velocity, expand_like
from tests.helpers.training import chain, full_run, loss_of, make, parse, student_run

SHAPE = (256, 1, 2, 2)


def gaussian(mean: float, std: float) -> Velocity:
    """The exact velocity of data N(mean, std^2): E[z - x0 | x_s], by linear regression."""

    def velocity(x: torch.Tensor, flow_t: torch.Tensor) -> torch.Tensor:
        s = expand_like(flow_t, x)
        variance = (1 - s) ** 2 * std**2 + s**2
        return -mean + (s - (1 - s) * std**2) / variance * (x - (1 - s) * mean)

    return velocity


def make_matching(**settings: object) -> DistributionMatching:
    config = MatchingConfig.model_validate({"optimizer": {}, **settings})
    return DistributionMatching(config, None, nn.Identity())  # type: ignore[arg-type]  # its fake model is passed to every call


def test_pictures_of_the_right_distribution_stay() -> None:
    fake, flow_t = torch.randn(SHAPE), torch.rand(SHAPE[0])
    same = gaussian(0.0, 1.0)
    assert not direction(fake, torch.randn(SHAPE), flow_t, same, same).any()


def test_the_direction_is_the_difference_of_scores() -> None:
    """Against the closed form: clean predictions differ by s^2/(1-s) times the difference of the scores of the noised pictures."""
    torch.manual_seed(0)
    fake, noise = torch.randn(SHAPE, dtype=torch.float64) * 0.5 + 2, torch.randn(SHAPE, dtype=torch.float64)
    flow_t = torch.rand(SHAPE[0], dtype=torch.float64) * 0.9 + 0.05
    found = direction(fake, noise, flow_t, gaussian(0.0, 1.0), gaussian(2.0, 0.5))
    s = expand_like(flow_t, fake)
    x = (1 - s) * fake + s * noise
    score_of_data = -x / ((1 - s) ** 2 + s**2)
    score_of_fakes = -(x - (1 - s) * 2) / ((1 - s) ** 2 * 0.25 + s**2)
    wanted = (x + s**2 * score_of_data) / (1 - s)
    distance = (fake - wanted).flatten(1).norm(dim=1)
    expected = s**2 / (1 - s) * (score_of_fakes - score_of_data) / expand_like(distance, fake)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)  # the velocities are rounded to fp32


def test_descending_the_loss_makes_one_distribution_of_the_other() -> None:
    """A student that shifts and scales noise, followed exactly, ends at the teacher's mean and deviation."""
    torch.manual_seed(0)
    matching = make_matching(time_std=1.0)
    mean, log_std = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-1.0))
    optimizer = torch.optim.Adam([mean, log_std], lr=0.03)
    for _ in range(300):
        fake = mean + log_std.exp() * torch.randn(SHAPE)
        fake_model = gaussian(mean.item(), log_std.exp().item())
        loss = matching.student_loss(fake, gaussian(-1.0, 0.5), fake_model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert mean.item() == pytest.approx(-1.0, abs=0.1)
    assert log_std.exp().item() == pytest.approx(0.5, abs=0.1)


def test_the_losss_gradient_is_the_direction() -> None:
    matching = make_matching()
    fake = torch.randn(SHAPE, requires_grad=True)
    torch.manual_seed(1)
    loss = matching.student_loss(fake, gaussian(0.0, 1.0), gaussian(1.0, 1.0))
    (gradient,) = torch.autograd.grad(loss, fake)
    torch.manual_seed(1)
    flow_t = matching.draw_times(fake)
    expected = direction(
        fake.detach(), torch.randn_like(fake), flow_t, gaussian(0.0, 1.0), gaussian(1.0, 1.0)
    )
    torch.testing.assert_close(gradient * SHAPE[0], expected, rtol=1e-4, atol=1e-6)
    assert loss.item() == pytest.approx(expected.square().flatten(1).sum(1).mean().item() / 2, rel=1e-4)


def test_the_weight_grows_while_the_fake_model_catches_up() -> None:
    matching = make_matching(weight=2.0, warmup_steps=10)
    assert [matching.weight(step) for step in (0, 5, 10, 500)] == [0.0, 1.0, 2.0, 2.0]


def test_three_players_take_turns_and_the_fake_model_learns_the_students_pictures(tmp_path: Path) -> None:
    stage = make(parse(full_run(tmp_path, chain() / "teacher" / "final")))
    trainer = Trainer(stage, stage.config)  # type: ignore[attr-defined]
    moved = []
    for step in range(3):
        before = {name: [p.clone() for p in module.parameters()] for name, module in stage.players.items()}
        trainer.step(step)
        moved.append(
            {
                name
                for name, module in stage.players.items()
                if any(not torch.equal(a, b) for a, b in zip(module.parameters(), before[name], strict=True))
            }
        )
    assert moved == [{"student"}, {"discriminator"}, {"fake_model"}]


def test_matching_alone_reaches_every_part_of_the_student(tmp_path: Path) -> None:
    values = full_run(tmp_path, chain() / "teacher" / "final")
    del values["discriminator"], values["trajectories"], values["twinflow"]
    values["matching"]["warmup_steps"] = 0
    stage = make(parse({**values, "scm_weight": 0.0}))
    # A fake model that knows better than the student, or both agree and nothing moves.
    with torch.no_grad():
        loss_of(stage, DistributionMatching).fake_model.proj_out.weight.add_(0.1)  # type: ignore[attr-defined]
    loss, metrics = stage.loss(Part(step=2, indices=range(4)))
    loss.backward()
    assert metrics["matching_loss"] > 0
    still = {
        name for name, p in stage.players["student"].named_parameters() if p.grad is None or not p.grad.any()
    }
    # The log variance belongs to the consistency loss; a zero last layer keeps gradients from the first one's.
    assert {name.removeprefix("transformer.") for name in still} <= {
        "logvar.weight",
        "logvar.bias",
        "time_embed.guidance_embedder.linear_1.weight",
        "time_embed.guidance_embedder.linear_1.bias",
    }


def test_a_student_goes_on_from_a_folder(tmp_path: Path) -> None:
    folder = chain()
    started = make(
        parse(
            {
                **student_run(tmp_path, folder / "teacher" / "final"),
                "start": str(folder / "student" / "final"),
            }
        )
    )
    again = make(parse(student_run(tmp_path, folder / "teacher" / "final")))
    saved = torch.cat([p.flatten() for p in started.models.student.parameters()])  # type: ignore[attr-defined]
    fresh = torch.cat([p.flatten() for p in again.models.student.parameters()])  # type: ignore[attr-defined]
    assert not torch.equal(saved, fresh)
    exported = load_transformer(folder / "student" / "final")
    assert torch.equal(saved, torch.cat([p.flatten() for p in exported.parameters()]))


def test_the_fake_model_saves_memory_as_the_others_do(tmp_path: Path) -> None:
    values = {**full_run(tmp_path, chain() / "teacher" / "final"), "gradient_checkpointing": True}
    stage = make(parse(values))
    assert loss_of(stage, DistributionMatching).fake_model.gradient_checkpointing
