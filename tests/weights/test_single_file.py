"""A model in one file: written whole, read back whole, and everything else an error that names the file."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sana_sprint.weights import WeightsError, load_single_file, save_model, save_single_file
from tests.helpers.weights import Tiny, assert_same, tiny_model


def test_a_model_comes_back_from_one_file(tmp_path: Path) -> None:
    model = tiny_model()
    save_single_file(model, tmp_path / "deep" / "model.safetensors")
    loaded = load_single_file(Tiny, tmp_path / "deep" / "model.safetensors")
    assert loaded.config == model.config
    assert not loaded.training
    assert_same(loaded, model)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model.safetensors"]


def test_dtypes_are_cast_on_either_side(tmp_path: Path) -> None:
    model = tiny_model()
    save_single_file(model, tmp_path / "model.safetensors", dtype=torch.bfloat16)
    assert_same(load_single_file(Tiny, tmp_path / "model.safetensors"), model, torch.bfloat16)
    wide = load_single_file(Tiny, tmp_path / "model.safetensors", dtype=torch.float32)
    assert wide.linear.weight.dtype == torch.float32


def test_a_file_without_config_is_an_error(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    with pytest.raises(WeightsError, match=r"diffusion_pytorch_model\.safetensors holds no config"):
        load_single_file(Tiny, path)


def test_a_file_of_another_model_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    metadata = {"config": '{"_class_name": "Other", "width": 6}'}
    save_file({"a": torch.zeros(1)}, path, metadata=metadata)
    with pytest.raises(WeightsError, match="describes a 'Other', expected: 'TinyPublished'"):
        load_single_file(Tiny, path)


def test_missing_and_damaged_files_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        load_single_file(Tiny, path)
    save_single_file(tiny_model(), path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(WeightsError, match=r"model\.safetensors is truncated or not safetensors"):
        load_single_file(Tiny, path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_single_file(tiny_model(), path)
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("sana_sprint.weights.writing.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_single_file(tiny_model(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
