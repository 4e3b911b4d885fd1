"""`sana-sprint export`: folders and single files from a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sana_sprint.models.transformer import SanaTransformer2DModel
from sana_sprint.weights import load_model, load_single_file
from tests.helpers.cli import assert_refused, call, save_tiny_model, succeed


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory)


def test_a_component_as_one_file(tiny: Path, tmp_path: Path) -> None:
    target = tmp_path / "student.safetensors"
    assert succeed("export", tiny, target, "--dtype", "bf16").strip() == str(target)
    exported = load_single_file(SanaTransformer2DModel, target).state_dict()
    for name, value in load_model(SanaTransformer2DModel, tiny / "transformer").state_dict().items():
        assert torch.equal(exported[name], value.bfloat16()), name


def test_a_pipeline_in_another_dtype(tiny: Path, tmp_path: Path) -> None:
    succeed("export", tiny, tmp_path / "copy", "--dtype", "bf16")
    model = load_model(SanaTransformer2DModel, tmp_path / "copy" / "transformer")
    assert model.dtype == torch.bfloat16
    assert (tmp_path / "copy" / "model_index.json").is_file()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--component", "tokenizer"), "tokenizer"),
        (("--dtype", "fp4"), "fp4"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    tiny: Path, tmp_path: Path, extra: tuple[str, ...], message: str
) -> None:
    result = call("export", tiny, tmp_path / "x.safetensors", *extra)
    assert_refused(result, 2, message)
    assert not list(tmp_path.iterdir())
