"""The measure of consistency by noise level: nothing for a teacher and its exact copy on paths of one step, more on longer ones."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest
import torch

from recipes.emoji.consistency import ANGLES, distances
from recipes.emoji.export import EMBEDDED
from recipes.emoji.restore_teacher import without_guidance
from sana_sprint.models.transformer import SanaTransformer2DModel
from sana_sprint.train.models.student import with_guidance
from sana_sprint.weights import load_model, save_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A teacher made of the embedded student, and a student that is its copy."""
    base = tmp_path_factory.mktemp("consistency")
    student = load_model(SanaTransformer2DModel, EMBEDDED / "transformer", dtype=torch.float32)
    teacher = without_guidance(student, 2.0)
    for name, model in (("teacher", teacher), ("student", with_guidance(teacher))):
        save_model(model, base / name / "transformer")
        for part in ("vae", "tokenizer", "text_encoder"):
            shutil.copytree(EMBEDDED / part, base / name / part)
    return base / "teacher", base / "student"


def measured(folders: tuple[Path, Path], guidance: float, steps: int) -> list[tuple[float, float, float]]:
    teacher, student = folders
    return distances(
        argparse.Namespace(teacher=teacher, model=str(student), guidance=guidance, count=4, steps=steps)
    )


def test_a_copy_of_the_teacher_is_right_about_paths_of_one_step(
    folders: tuple[Path, Path], emoji_font: Path
) -> None:
    for angle, student, teacher in measured(folders, 1.0, 1):
        assert angle in ANGLES
        assert student < 1e-3  # bf16 products
        assert teacher < 1e-3


def test_and_as_wrong_as_the_teacher_about_longer_ones(folders: tuple[Path, Path], emoji_font: Path) -> None:
    rows = measured(folders, 1.0, 4)
    for _, student, teacher in rows:
        assert student == pytest.approx(teacher, rel=0.1)
    found = [student for _, student, _ in rows]
    assert found[0] > 10 * found[-1]  # a long path bends more
