"""Reading ahead changes when pictures are read, and nothing else."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from sana_sprint.train.data.prefetch import Ahead
from sana_sprint.train.data.source import RecordSource
from sana_sprint.train.stages.autoencoder import AutoencoderStage
from sana_sprint.train.stages.base import Part
from tests.helpers.data import png, write_folder
from tests.helpers.toy_stage import assert_same
from tests.helpers.training import autoencoder_run, make, parse, train


def test_what_is_expected_is_read_before_it_is_asked_for() -> None:
    done = {position: threading.Event() for position in range(4)}
    readers: dict[int, int] = {}

    def read(position: int) -> int:
        readers[position] = threading.get_ident()
        done[position].set()
        return 10 * position

    ahead = Ahead(read, is_concurrent=True)
    ahead.expect([2, 1])
    assert all(done[position].wait(timeout=60) for position in (1, 2))
    ahead.expect([1, 3])
    assert [ahead(position) for position in range(4)] == [0, 10, 20, 30]
    mine = {position for position, thread in readers.items() if thread == threading.get_ident()}
    assert mine == {0}
    assert ahead(2) == 20  # given away once: it is read again
    assert readers[2] == threading.get_ident()


def test_a_function_that_threads_must_not_call_is_called_when_asked() -> None:
    seen: list[int] = []
    ahead = Ahead(seen.append, is_concurrent=False)
    ahead.expect([0, 1])
    assert not seen
    ahead(1)
    assert seen == [1]


def test_an_error_comes_where_its_picture_is_asked_for() -> None:
    ahead = Ahead({0: "a"}.__getitem__, is_concurrent=True)
    ahead.expect([0, 1])
    assert ahead(0) == "a"
    with pytest.raises(KeyError, match="1"):
        ahead(1)


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """A run on eleven stored pictures, one of them broken, in two parts for each step."""
    pictures = [png(i, (20, 16)) for i in range(10)] + [b"broken"]
    folder = write_folder(tmp_path / "set", pictures, [["a picture"]] * 11)
    values = autoencoder_run(tmp_path / "run", steps=4)
    values["data"] = {"source": str(folder), "size": 16, "max_bad_fraction": 0.1}
    values["schedule"] |= {"accumulation": 2, "sample_every": 2}
    return values


def test_order_and_resuming_are_as_without(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def go(name: str, steps: int = 4) -> Path:
        output = Path(values["output"]).with_name(name)
        train({**values, "output": str(output), "schedule": {**values["schedule"], "steps": steps}})
        return output

    whole = go("whole")
    go("resumed", steps=2)
    assert_same(whole, go("resumed"))
    monkeypatch.setattr(RecordSource, "is_concurrent", False)
    assert_same(whole, go("plain"))


def test_a_step_reads_for_the_steps_after_it_and_none_beyond_the_last(values: dict[str, Any]) -> None:
    stage = make(parse(values))
    assert isinstance(stage, AutoencoderStage)
    stage.loss(Part(step=0, indices=range(1, 4, 2)))
    assert set(stage.samples.coming) == {4, 5, 6, 7}
    stage.loss(Part(step=3, indices=range(12, 16, 2)))
    assert set(stage.samples.coming) - {4, 5, 6, 7} == {13, 15}


def test_other_pictures_are_refused(values: dict[str, Any]) -> None:
    train(values)
    longer = {**values, "schedule": {**values["schedule"], "steps": 5}}
    picture = Path(values["data"]["source"]) / "0003.png"
    before = picture.read_bytes()
    picture.write_bytes(png(77, (20, 16)))
    with pytest.raises(
        ValueError, match=r"other data \(pictures and captions: \w{16}, was \w{16}\): restore"
    ):
        train(longer)
    picture.write_bytes(before)
    train(longer)
