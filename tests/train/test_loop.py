"""The loop's promises for every stage, shown on a toy: exact resume, equality of processes, averages, clean stops."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sana_sprint.train import distributed, loop, trainer
from sana_sprint.train.checkpoint import checkpoints
from sana_sprint.train.data.sampler import own_parts
from sana_sprint.train.stages.base import Metrics, Part
from tests.helpers.toy_stage import Toy, assert_same, in_processes, saved, toy_run, train_toy
from tests.helpers.training import parse, silent


def entries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_five_steps_a_kill_and_five_more_are_ten(tmp_path: Path) -> None:
    train_toy(toy_run(tmp_path / "whole", steps=10))
    killed = in_processes([toy_run(tmp_path / "killed", steps=10)], die_at=7)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    train_toy(toy_run(tmp_path / "killed", steps=10))
    assert_same(tmp_path / "whole", tmp_path / "killed")
    # Steps 6 and 7 were done twice and are told once. Speed is the machine's.
    logs = [
        [{k: v for k, v in entry.items() if k != "samples_per_s"} for entry in entries(tmp_path / name)]
        for name in ("whole", "killed")
    ]
    assert [entry["step"] for entry in logs[1]] == [0, 2, 4, 6, 8, 10, 10]
    assert logs[0][4:] == logs[1][4:]


def test_two_processes_are_two_parts_of_one(tmp_path: Path) -> None:
    """Bitwise: both compute (gradient 0 + gradient 1) / 2, and halving is exact."""
    plain = toy_run(tmp_path / "alone", **{"schedule.accumulation": 2, "optimizer.name": "muon"})
    together = toy_run(tmp_path / "together", **{"optimizer.name": "muon"})
    sharded = toy_run(tmp_path / "sharded", **{"optimizer.name": "muon", "distribution": "shard"})
    train_toy(plain)
    done = in_processes([together, sharded], processes=2, stopped=toy_run(tmp_path / "stopped"))
    assert done.returncode == 0, done.stderr
    # What one process was told, both did: after one step.
    assert [path.name for path in checkpoints(tmp_path / "stopped")] == ["checkpoint-00000001.pt"]
    assert_same(tmp_path / "alone", tmp_path / "together")
    assert_same(tmp_path / "alone", tmp_path / "sharded")
    alone, exported = (
        torch.load(tmp_path / name / "final/student.pt", weights_only=True) for name in ("alone", "sharded")
    )
    assert all(torch.equal(alone[name], exported[name]) for name in alone)
    # A sharded run continues in one process as if it had always been one.
    for name in ("alone", "sharded"):
        more = {"optimizer.name": "muon", "schedule.accumulation": 2}
        train_toy(toy_run(tmp_path / name, steps=6, **more))
    assert_same(tmp_path / "alone", tmp_path / "sharded")


def test_buckets_hold_every_tensor_once_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_BUCKET", 10)
    tensors = [torch.zeros(size) for size in (3, 8, 25, 1, 2)]
    buckets = list(distributed.buckets_of(tensors))
    assert [[t.numel() for t in bucket] for bucket in buckets] == [[3, 8], [25], [1, 2]]


def test_parts_divide_every_batch_whatever_the_accumulation(tmp_path: Path) -> None:
    for accumulation in (1, 2, 4):
        run = parse(toy_run(tmp_path, **{"schedule.accumulation": accumulation}))
        parts = [part for _, part in own_parts(3, run.schedule)]
        assert len(parts) == accumulation
        assert sorted(i for part in parts for i in part.indices) == [12, 13, 14, 15]
    with pytest.raises(ValueError, match=r"batch_size must be divisible by .* = 3; got 4"):
        train_toy(toy_run(tmp_path, **{"schedule.accumulation": 3}))


def test_an_epoch_that_is_no_multiple_of_the_batch_loses_no_sample(tmp_path: Path) -> None:
    toy = train_toy(toy_run(tmp_path, steps=5))
    indices = [index for _, batch in toy.seen for index in batch]
    assert sorted(indices[:10]) == sorted(indices[10:]) == list(range(10))


def test_the_players_alternate_and_learn_with_their_own_optimizers(tmp_path: Path) -> None:
    toy = train_toy(toy_run(tmp_path, steps=5))
    assert [player for player, _ in toy.seen] == ["student", "discriminator"] * 2 + ["student"]
    state = saved(tmp_path)
    assert ".players.student.optimizer.0.weight.exp_avg" in state
    assert ".players.discriminator.optimizer.parametrizations.weight.original.square_rows" in state
    assert state[".players.student.optimizer.0.weight.step"] == 3  # Adam counts its own steps


class Broken(Toy):
    """Its loss is not a number at some steps."""

    broken_steps: range = range(0)

    def loss(self, part: Part) -> tuple[Tensor, Metrics]:
        loss, metrics = super().loss(part)
        return (loss * float("nan") if part.step in self.broken_steps else loss), metrics


def test_a_step_that_is_not_finite_is_skipped_counted_and_shifts_nothing(tmp_path: Path) -> None:
    run = parse(toy_run(tmp_path, steps=6))
    toy = Broken(run)
    toy.broken_steps = range(2, 3)
    loop.run(toy, run, report=silent)
    assert [player for player, _ in toy.seen] == ["student", "discriminator"] * 3
    state = saved(tmp_path)
    assert state[".players.student.optimizer.0.weight.step"] == 2  # of its turns 0, 2 and 4
    assert state[".skipped_steps"] == 1
    assert state[".bad_steps"] == 0
    assert all(torch.isfinite(value).all() for value in state.values())
    assert [entry["skipped_steps"] for entry in entries(tmp_path) if "skipped_steps" in entry] == [0, 1, 1]
    # The count goes on after a resume.
    train_toy(toy_run(tmp_path, steps=7))
    assert saved(tmp_path)[".skipped_steps"] == 1


def test_many_steps_in_a_row_that_are_not_finite_end_the_run(tmp_path: Path) -> None:
    run = parse(toy_run(tmp_path, steps=40))
    toy = Broken(run)
    toy.broken_steps = range(5, 40)
    with pytest.raises(RuntimeError, match="20 steps in a row were not finite, the last at step 24"):
        loop.run(toy, run, report=silent)
    # The checkpoint of step 20 remembers the 15 before it: continuing does not begin to count anew.
    assert saved(tmp_path)[".bad_steps"] == trainer.MAX_BAD_STEPS - 5


def test_validation_and_export_see_the_average(tmp_path: Path) -> None:
    train_toy(toy_run(tmp_path, steps=5, players=1, **{"schedule.sample_every": 2}))
    state = saved(tmp_path)
    names = [name.removeprefix(".ema.") for name in state if name.startswith(".ema.")]
    assert len(names) == 6
    for file in ("final/student.pt", "samples/5.pt"):
        seen = torch.load(tmp_path / file, weights_only=True)
        assert all(torch.equal(seen[name], state[f".ema.{name}"]) for name in names)
    # The live weights are others: five steps at a rate of 0.01 are far from their average.
    assert not torch.equal(state[".players.student.module.0.weight"], state[".ema.0.weight"])
    assert [entry["step"] for entry in entries(tmp_path) if "size" in entry] == [0, 2, 4, 5]


def test_the_average_follows_with_a_decay_that_warms_up() -> None:
    from sana_sprint.train.ema import EMA

    weight = torch.nn.Parameter(torch.zeros(1))
    ema = EMA({"weight": weight}, 0.9)
    with torch.no_grad():
        weight.fill_(1.0)
    ema.update(0)
    assert ema.weights["weight"].item() == pytest.approx(1 - 1 / 10)  # decay (1 + 0) / (10 + 0)
    ema.swap()
    assert weight.item() == pytest.approx(0.9)
    ema.swap()
    assert weight.item() == 1.0
    ema.update(1000)  # the decay itself, from here on
    assert ema.weights["weight"].item() == pytest.approx(0.9 * 0.9 + 0.1)


def test_the_log_averages_over_its_interval_and_names_what_each_player_did(tmp_path: Path) -> None:
    train_toy(toy_run(tmp_path, steps=8, **{"schedule.log_every": 4}))
    first, second = (entry for entry in entries(tmp_path) if "loss" in entry)
    assert (first["step"], second["step"]) == (4, 8)
    assert (first["turn"], second["turn"]) == (1.0, 5.0)  # the student's turns are 0, 2 and 4, 6
    assert (first["only_0"], first["only_2"]) == (
        1.0,
        1.0,
    )  # each of one step: a mean over those that have it
    assert {"loss", "grad_norm", "discriminator_loss", "discriminator_grad_norm"} <= first.keys()
    assert first["samples_per_s"] > 0


def test_values_that_are_not_finite_stay_out_of_the_averages(tmp_path: Path) -> None:
    run = parse(toy_run(tmp_path, steps=4, **{"schedule.log_every": 4}))
    toy = Broken(run)
    toy.broken_steps = range(1)
    loop.run(toy, run, report=silent)
    (entry,) = (entry for entry in entries(tmp_path) if "loss" in entry)
    assert entry["loss"] == entry["loss"]  # step 2's; a NaN is no valid JSON either


def test_a_run_told_to_stop_saves_and_continues_exactly(tmp_path: Path) -> None:
    train_toy(toy_run(tmp_path / "whole", steps=6))
    values = toy_run(tmp_path / "stopped", steps=6)
    lines: list[str] = []
    answers = iter([False, False, True])
    run = parse(values)
    assert not loop.run(Toy(run), run, report=lines.append, should_stop=lambda: next(answers))
    assert lines[-1] == "stopped at step 3, and saved"
    assert not (tmp_path / "stopped" / "final").exists()
    with (tmp_path / "stopped" / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # what a crash may leave
    train_toy(values)
    assert_same(tmp_path / "whole", tmp_path / "stopped")
    assert [entry["step"] for entry in entries(tmp_path / "stopped")] == [0, 2, 4, 6, 6]


def test_tensorboard_gets_what_the_log_gets(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_toy(toy_run(tmp_path, steps=4, tensorboard=True))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = [(entry["step"], entry["loss"]) for entry in entries(tmp_path) if "loss" in entry]
    told = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in told] == [step for step, _ in logged]
    for (_, value), (_, expected) in zip(told, logged, strict=True):
        assert value == pytest.approx(expected, rel=1e-6)  # TensorBoard keeps fp32


def test_tensorboard_without_its_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install \"sana-sprint\[train\]\""):
        train_toy(toy_run(tmp_path, tensorboard=True))
