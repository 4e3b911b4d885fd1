"""Trajectories of the teacher: what they are, that they are kept, and that a student learns from them what they say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
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
from sana_sprint.train.distillation import Batch
from sana_sprint.train.losses import SCM, TrajectoryRegression
from sana_sprint.train.losses.flow import guided
from sana_sprint.train.losses.trajectories import end_loss
from sana_sprint.train.models.student import with_guidance
from sana_sprint.train.stages.base import Part
from sana_sprint.train.trainer import Trainer
from sana_sprint.trigflow import T_MAX, expand_like, trig_to_flow
from tests.helpers.training import chain, control_student_run, loss_of, make, parse, trajectories_run

SHAPE = (3, 2, 2)


def gaussian(std: float) -> Any:
    """The exact velocity of data N(0, std^2), whose paths are x_s = x_0 sqrt((1-s)^2 + s^2/std^2)."""

    def velocity(x: Tensor, flow_t: Tensor) -> Tensor:
        s = expand_like(flow_t, x)
        return (s - (1 - s) * std**2) / ((1 - s) ** 2 * std**2 + s**2) * x

    return velocity


def traced(indices: range) -> Traced:
    """Trajectories whose numbers say whose they are: point k of trajectory i is i everywhere, and the end too."""
    numbers = torch.arange(indices.start, indices.stop)
    points = expand_like(numbers.float(), torch.empty(len(numbers), 1, *SHAPE)).expand(-1, 5, *SHAPE)
    s0 = 0.5 + 0.5 * (numbers % 2)
    captions = [f"caption {i}" for i in indices]
    instruction = indices.start // CHUNK_SIZE % 2 == 1
    return Traced(points, s0, 4 + numbers / 1024, numbers, captions, instruction)


def stored(folder: Path, count: int, settings: object = "teacher", **config: Any) -> Trajectories:
    return cached_trajectories(
        folder,
        TrajectoriesConfig(count=count, num_steps=4, **config),
        traced,
        settings=[settings],
        seed=0,
        report=lambda line: None,
    )


def test_a_trajectory_follows_the_flow_to_the_data() -> None:
    torch.manual_seed(0)
    u, t = torch.randn(64, *SHAPE), draw_starts(64, 0.5)
    points = trace(gaussian(0.5), u, t, num_steps=400)
    assert points.shape == (64, 401, *SHAPE)
    for k in (0, 200, 400):
        s = expand_like(trig_to_flow(t) * (1 - k / 400), u)
        size = points[:, k].float() / torch.sqrt((1 - s) ** 2 * 0.25 + s**2)
        if k == 0:
            first = size
        torch.testing.assert_close(size, first, rtol=0.02, atol=0.02)  # bf16, and 400 Euler steps


def test_starts() -> None:
    torch.manual_seed(0)
    t = draw_starts(4000, 0.25)
    assert (t == T_MAX).float().mean() == pytest.approx(0.25, abs=0.03)
    assert t.min() >= T_MAX / 2
    assert t[t < T_MAX].mean() == pytest.approx(0.75 * T_MAX, rel=0.01)


def test_the_loss_goes_to_an_end_and_weighs_samples_alike() -> None:
    clean = torch.randn(2, *SHAPE, dtype=torch.float64).mul(torch.tensor([1.0, 100.0])[:, None, None, None])
    clean.requires_grad_()
    end_loss(clean, torch.zeros_like(clean)).backward()
    assert clean.grad is not None
    torch.testing.assert_close(
        clean.grad.flatten(1).norm(dim=1) * 2, torch.ones(2, dtype=torch.float64), rtol=1e-4, atol=0
    )
    # Of 2 paths to one end and 1 to another from the same point, the best answer is the first end, not two thirds between.
    ends = torch.tensor([0.0, 0.0, 1.0])[:, None, None, None].expand(3, *SHAPE)
    found = [end_loss(torch.full((3, *SHAPE), value), ends).item() for value in (0.0, 1 / 3, 1.0)]
    assert min(found) == found[0]


def test_points_are_drawn_from_the_right_places(tmp_path: Path) -> None:
    torch.manual_seed(0)
    count = 200  # the last chunk is smaller
    trajectories = stored(tmp_path, count, start_rate=0.5)
    assert len(trajectories) == count
    visited: list[int] = []
    at_start = 0
    for step in range(count // 8):
        points = trajectories.draw(range(step * 8, step * 8 + 8), batch_size=8)
        numbers = points.indices
        visited += numbers.tolist()
        assert points.captions == [f"caption {i}" for i in numbers]
        assert {int(i) // CHUNK_SIZE % 2 == 1 for i in numbers} == {points.instruction}
        torch.testing.assert_close(points.guidance, 4 + numbers / 1024)
        s0 = 0.5 + 0.5 * (numbers % 2)
        k = 4 * (1 - trig_to_flow(points.t) / s0)
        torch.testing.assert_close(k, k.round(), rtol=0, atol=1e-4)
        assert k.min() > -0.5
        assert k.max() < 3.5  # never the end itself
        at_start += int((k.round() == 0).sum())
        rounded = numbers.bfloat16().float()
        torch.testing.assert_close(points.end, expand_like(rounded, points.end).expand_as(points.end))
        c = 1 / (torch.cos(points.t) + torch.sin(points.t))
        torch.testing.assert_close(points.u * expand_like(c, points.u), points.end)
    # Both ways of prompting have an even share, and every trajectory is visited as good as once an epoch.
    assert max(visited.count(i) for i in range(count)) <= 2
    assert len(set(visited)) > 0.9 * count
    assert at_start / count == pytest.approx(0.5 + 0.5 / 4, abs=0.1)


def test_processes_share_a_batch(tmp_path: Path) -> None:
    trajectories = stored(tmp_path, 128)
    whole = trajectories.draw(range(8, 16), batch_size=8).indices.tolist()
    halves = [trajectories.draw(range(8 + rank, 16, 2), batch_size=8).indices.tolist() for rank in (0, 1)]
    assert whole == [i for pair in zip(*halves, strict=True) for i in pair]


def test_what_is_kept_is_not_made_again(tmp_path: Path) -> None:
    first = stored(tmp_path, 512)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "trajectories").iterdir()}
    assert len(files) == 1
    grown = stored(tmp_path, 700)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert len(list((tmp_path / "trajectories").iterdir())) == 2
    stored(tmp_path, 512, "another teacher")
    assert len(list((tmp_path / "trajectories").iterdir())) == 3
    assert len({each.facts["trajectories"] for each in (first, grown)}) == 2


def test_the_same_trajectories_come_out_at_any_time(tmp_path: Path) -> None:
    values = trajectories_run(tmp_path / "run", chain() / "teacher" / "final")
    make(parse(values))
    (path,) = (tmp_path / "trajectories").iterdir()
    before = path.read_bytes()
    path.unlink()
    torch.rand(7)
    stage: Any = make(parse(values))
    assert path.read_bytes() == before
    again: Any = make(parse(values))  # from the file
    for one, other in zip(stage.student.parameters(), again.student.parameters(), strict=True):
        assert torch.equal(one, other)  # computing them has moved no other random number


@pytest.mark.parametrize("controlled", [False, True])
def test_a_student_that_is_its_teacher_is_right_about_paths_of_one_step(
    tmp_path: Path, controlled: bool
) -> None:
    """Captions, instruction, conditions, guidance and both changes of variables are the teacher's, or this is not small."""
    folder = chain()
    path = {"count": 24, "num_steps": 1, "noise_rate": 0.0}
    values = {**trajectories_run(tmp_path / "run", folder / "teacher" / "final"), "trajectories": path}
    if controlled:
        values = {**control_student_run(tmp_path / "run", folder), "trajectories": path}
        del values["discriminator"], values["matching"], values["twinflow"]
        values["scm_weight"] = 0.0
    values["guidance_scales"] = [1.0]
    values["instruction_rate"] = 0.5
    stage: Any = make(parse(values))
    if controlled:  # its base has learnt for a few steps
        teacher = with_guidance(stage.models.teacher.transformer)
        stage.models.student.transformer.load_state_dict(teacher.state_dict())
    stored = loss_of(stage, TrajectoryRegression).trajectories
    spread = torch.cat([stored.draw(range(i, i + 4), batch_size=4).end for i in range(0, 24, 4)]).std()
    for step in range(6):  # both ways of prompting
        loss, _ = stage.loss(Part(step, range(4 * step, 4 * step + 4)))
        assert loss.item() < 0.01 * spread * math.sqrt(math.prod(stage.source.cache.shape))


def test_a_student_learns_from_trajectories_alone(tmp_path: Path) -> None:
    values = trajectories_run(tmp_path / "run", chain() / "teacher" / "final", steps=60)
    values["optimizer"] = {"warmup_steps": 1, "learning_rate": 3e-3}
    stage: Any = make(parse(values))

    def distance() -> float:
        total = 0.0
        with torch.no_grad():
            for step in range(6):
                torch.manual_seed(step)
                total += stage.loss(Part(0, range(4 * step, 4 * step + 4)))[0].item()
        return total

    before = distance()
    trainer = Trainer(stage, stage.config)
    assert set(stage.players) == {"student"}
    for step in range(60):
        metrics = trainer.step(step)
        assert metrics["loss"] == pytest.approx(metrics["trajectory_loss"])
    assert distance() < 0.8 * before


def test_they_count_beside_the_other_losses(tmp_path: Path) -> None:
    values = trajectories_run(tmp_path / "run", chain() / "teacher" / "final")
    values["scm_weight"] = 1.0
    values["trajectories"]["weight"] = 2.0
    stage: Any = make(parse(values))
    part = Part(0, range(4))
    torch.manual_seed(0)
    both, metrics = stage.loss(part)
    torch.manual_seed(0)
    alone, _ = loss_of(stage, SCM).student(Batch(stage.distillation, part, is_students_turn=True))
    assert both.item() == pytest.approx(alone.item() + 2 * metrics["trajectory_loss"], rel=1e-5)
    assert "trajectories" in stage.data


def test_guidance_can_be_left_out_at_little_noise() -> None:
    x, scale = torch.randn(4, *SHAPE), torch.tensor([2.0, 3.0, 4.0, 5.0])
    flow_t = torch.tensor([0.2, 0.35, 0.36, 0.9])
    told: list[int] = []

    def uncaptioned(x: Tensor, flow_t: Tensor) -> Tensor:
        told.append(len(x))
        return -x

    for projected in (False, True):
        late = guided(lambda x, s: x, uncaptioned, scale, projected=projected, start=0.35)(x, flow_t)
        always = guided(lambda x, s: x, uncaptioned, scale, projected=projected)(x, flow_t)
        assert torch.equal(late[:2], x[:2])
        assert torch.equal(late[2:], always[2:])
    told.clear()
    low = guided(lambda x, s: x, uncaptioned, 4.5, start=0.35)(x, torch.full((4,), 0.35))
    assert torch.equal(low, x)
    assert not told  # and then it costs nothing
