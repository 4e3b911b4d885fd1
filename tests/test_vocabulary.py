"""A small model's folder says which words it was taught, and the commands say which it was not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sana_sprint import SanaSprintPipeline, vocabulary
from sana_sprint.vocabulary import Vocabulary
from tests.helpers.cli import call, save_tiny_model, succeed

TAUGHT = Vocabulary.of(["a cat on a blue background", "two T-Rexes"])


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_tiny_model(tmp_path_factory)
    TAUGHT.write(path)
    return path


def test_words_are_letters_digits_and_what_joins_them() -> None:
    assert vocabulary.split("A T-Rex, the king's (3D) \u00e9toile-_x!") == [
        "a",
        "t-rex",
        "the",
        "king's",
        "3d",
        "\u00e9toile",
        "x",
    ]
    assert vocabulary.split("...") == []


def test_words_that_were_not_taught_are_named_once_in_their_order() -> None:
    text = "Two cats riding a blue CAT, riding on oil"
    assert TAUGHT.untaught(text) == ("cats", "riding", "oil")
    assert TAUGHT.untaught("two t-rexes on a blue cat") == ()


def test_a_folder_keeps_the_words_and_may_have_none(tmp_path: Path) -> None:
    assert vocabulary.read(tmp_path) is None
    TAUGHT.write(tmp_path)
    assert vocabulary.read(tmp_path) == TAUGHT


def test_pipelines_pass_it_on(folder: Path, tmp_path: Path) -> None:
    pipeline = SanaSprintPipeline.from_pretrained(folder)
    assert pipeline.vocabulary == TAUGHT
    shared = SanaSprintPipeline.from_pipe(pipeline)
    shared.save_pretrained(tmp_path / "copy")
    assert SanaSprintPipeline.from_pretrained(tmp_path / "copy").vocabulary == TAUGHT


def test_generate_notes_what_was_not_taught(folder: Path, tmp_path: Path) -> None:
    def note(prompt: str) -> str:
        result = call("generate", prompt, "--model", folder, "--output", tmp_path, "--steps", "1")
        assert result.exit_code == 0, result.output
        return str(result.stderr)

    assert "note: not taught: riding, oil" in note("a cat riding a cat, oil")
    assert "not taught" not in note("a blue cat")


def test_info_lists_the_words(folder: Path) -> None:
    assert json.loads(succeed("info", folder, "--json"))["vocabulary"] == sorted(TAUGHT.words)
    (line,) = (line for line in succeed("info", folder).splitlines() if line.startswith("words"))
    assert line.split()[1:3] == ["7:", "a,"]
    (folder / vocabulary.FILE_NAME).unlink()
    assert json.loads(succeed("info", folder, "--json"))["vocabulary"] is None
    assert "words" not in succeed("info", folder)


def test_the_embedded_model_knows_its_world_and_says_what_it_does_not() -> None:
    taught = SanaSprintPipeline.from_pretrained("emoji").vocabulary
    assert taught is not None
    assert taught.untaught("a photo of three red hearts above a pair of scissors on a gray background") == ()
    assert taught.untaught("a cat riding a bicycle, oil painting") == ("riding", "oil", "painting")
