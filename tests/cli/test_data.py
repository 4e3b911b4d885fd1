"""`sana-sprint data check`: what a set holds, and what is wrong with it."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sana_sprint.resolutions import nearest_bucket
from tests.helpers.cli import assert_refused, call, succeed
from tests.helpers.data import WRITERS, png, write_folder

SHAPES = [(64, 64), (96, 48), (64, 64), (70, 64), (20, 20)]  # (width, height)
CAPTIONS = [["one two", "three"], ["a wide one"], ["another square"], ["nearly square"], ["small"]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "set", [png(i, shape) for i, shape in enumerate(SHAPES)], CAPTIONS)


def told(*arguments: object) -> dict[str, Any]:
    result = call("data", "check", *arguments, "--size", "64", "--multiple", "16", "--json")
    assert result.exit_code in (0, 1), result.output
    facts: dict[str, Any] = json.loads(result.stdout)
    return facts


def test_a_good_set(folder: Path) -> None:
    facts = told(folder)
    assert (facts["samples"], facts["held_out"]) == (5, 0)
    assert facts["widths"] == {"min": 20, "median": 64, "max": 96}
    assert facts["heights"] == {"min": 20, "median": 64, "max": 64}
    assert facts["buckets"] == {"48x96": 1, "64x64": 4}
    assert facts["captions_per_picture"] == {"min": 1, "median": 1, "max": 2}
    assert facts["caption_words"] == {"min": 1, "median": 2, "max": 3}
    assert facts["caption_characters"] == {"min": 5, "median": 8.5, "max": 14}
    assert facts["enlarged"] == [str(folder / "0004.png")]
    assert facts["unreadable"] == {}
    assert facts["uncaptioned"] == facts["duplicates"] == []


def test_the_text_says_the_same(folder: Path) -> None:
    lines = succeed("data", "check", folder, "--size", "64", "--multiple", "16").splitlines()
    assert "samples     5, 0 of the set held out for validation" in lines
    assert "width       20 to 96 px, median 64" in lines
    assert f"    48x96        1 {'#' * 10}" in lines
    assert f"    64x64        4 {'#' * 40}" in lines
    assert lines[-2:] == ["smaller than their bucket (would be enlarged): 1", f"  {folder / '0004.png'}"]
    assert not any("without a caption" in line or "same picture" in line for line in lines)


def test_the_default_buckets_are_those_of_1024_px(folder: Path) -> None:
    lines = succeed("data", "check", folder).splitlines()
    found = {line.split()[0]: int(line.split()[1]) for line in lines if line.endswith("#")}
    sizes = (nearest_bucket(height, width, 1024, 32) for width, height in SHAPES)
    assert found == Counter(f"{height}x{width}" for height, width in sizes)


@pytest.mark.parametrize("kind", WRITERS)
def test_what_is_unusable_is_named(kind: str, tmp_path: Path) -> None:
    source = WRITERS[kind](tmp_path, [png(0), b"broken", png(2), png(2)], [["one"], ["two"], [], ["four"]])
    result = call("data", "check", source, "--json")
    assert result.exit_code == 1
    facts = json.loads(result.stdout)
    (unreadable,) = facts["unreadable"]
    assert facts["unreadable"][unreadable] == "no picture that can be decoded"
    (uncaptioned,) = facts["uncaptioned"]
    ((first, second),) = facts["duplicates"]
    assert first == uncaptioned
    assert len({unreadable, first, second}) == 3
    error, hint = result.stderr.splitlines()
    assert error == f"error: 2 of 4 samples cannot be used, the first: {unreadable}"
    assert hint.startswith("hint: ")
    text = call("data", "check", source).stdout
    assert f"unreadable: 1\n  {unreadable}: no picture" in text
    assert f"without a caption: 1\n  {uncaptioned}\n" in text
    assert f"the same picture: 1\n  {first} = {second}\n" in text


def test_pictures_alone_are_a_set_for_an_autoencoder(tmp_path: Path) -> None:
    lines = succeed("data", "check", write_folder(tmp_path, [png(0), png(1)], [[], []])).splitlines()
    assert "no picture has a caption: this set can train an autoencoder only" in lines


def test_long_lists_are_cut(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [png(i) for i in range(12)], [["x"]] * 12)
    assert "would be enlarged): 12\n" in (text := succeed("data", "check", folder))
    assert text.endswith(f"{folder / '0009.png'}\n  and 2 more\n")


def test_a_function_needs_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "drawn", raising=False)
    code = "import numpy as np\ndef picture(i): return np.full((8, 8, 3), i % 3, np.uint8), 'gray'\n"
    (tmp_path / "drawn.py").write_text(code)
    assert_refused(call("data", "check", "drawn:picture"), 1, "--limit")
    facts = told("drawn:picture", "--limit", 4)
    assert facts["samples"] == 4
    assert facts["duplicates"] == [["drawn:picture(0)", "drawn:picture(3)"]]


def test_a_limit_looks_at_the_first(folder: Path) -> None:
    (folder / "0003.png").write_bytes(b"broken")
    assert told(folder, "--limit", 3)["unreadable"] == {}
    assert told(folder, "--limit", 30)["samples"] == 5


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["check", "absent"], 1, "neither a folder nor"),
        (["check"], 2, "SOURCE"),
        (["chekc", "x"], 2, "chekc"),
        (["check", "x", "--size", "1000"], 2, "multiple of 32"),
        (["check", "x", "--limit", "0"], 2, "limit"),
    ],
)
def test_wrong_calls_are_refused(arguments: list[str], code: int, word: str) -> None:
    assert_refused(call("data", *arguments), code, word)
