"""Instructions kept on disk: the same embeddings without running them, and nothing that can go wrong matters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from sana_sprint.backends import prompt_files
from tests.helpers.text import INSTRUCTION, record_runs, tiny_encoder


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, and small models count."""
    monkeypatch.setenv(prompt_files.VARIABLE, str(tmp_path))
    monkeypatch.setattr(prompt_files, "MIN_PARAMETERS", 0)
    return tmp_path / "prefixes"


@torch.no_grad()
def encode(change: float = 0.0) -> tuple[torch.Tensor, int]:
    """The embeddings that a new process gets, and how many tokens its model runs."""
    encoder = tiny_encoder()
    next(encoder.text_encoder.parameters()).view(-1)[0] += change
    runs = record_runs(encoder.text_encoder)
    embeds = encoder.encode(["a cat"], complex_human_instruction=INSTRUCTION).embeds
    return embeds, sum(length for _, length in runs)


def test_a_new_process_does_not_run_the_instruction(store: Path) -> None:
    (first, ran), (again, ran_again) = encode(), encode()
    assert torch.equal(first, again)
    assert ran_again == 2 < ran  # 'a cat'
    assert len(list(store.iterdir())) == 1


def test_other_weights_have_another_file(store: Path) -> None:
    encode()
    assert encode(change=1.0)[1] == encode(change=2.0)[1] > 2
    assert len(list(store.iterdir())) == 3


@pytest.mark.parametrize("damage", ["empty", "cut", "foreign"])
def test_a_damaged_file_is_made_again(store: Path, damage: str) -> None:
    first, ran = encode()
    (path,) = store.iterdir()
    whole = path.read_bytes()
    if damage == "foreign":
        prompt_files.write(path.stem, {"x": torch.zeros(1)})
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
    again, ran_again = encode()
    assert torch.equal(first, again)
    assert ran_again == ran
    assert path.read_bytes() == whole


def test_without_a_disk_things_are_only_slower(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.parent.joinpath("file").write_text("")
    for place in ("off", str(store.parent / "file")):
        monkeypatch.setenv(prompt_files.VARIABLE, place)
        assert encode()[1] == encode()[1] > 2
    assert not store.exists()


def test_the_files_used_last_stay(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_files, "MAX_FILES", 2)
    for change in (0.0, 1.0, 2.0):
        encode(change)
    assert len(list(store.iterdir())) == 2
    assert encode(2.0)[1] == 2


def test_small_and_quantised_models_are_not_kept(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(4, 4)
    assert prompt_files.name_of(model, (1,), None)
    assert not prompt_files.name_of(model.to("meta"), (1,), None)
    monkeypatch.undo()
    assert not prompt_files.name_of(nn.Linear(4, 4), (1,), None)
