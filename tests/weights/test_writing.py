"""Writing model folders: what diffusers would write, whole at every moment, and nothing left of older files."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from sana_sprint.weights import WeightsError, load_model, save_model
from tests.helpers.weights import INDEX, WHOLE, Tiny, TinyConfig, assert_same


def test_config_and_header_are_diffusers_own(folder):
    config = json.loads((folder / "config.json").read_text())
    version = config.pop("_diffusers_version")
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert config == {"_class_name": "TinyPublished", "width": 6, "sizes": [2, 3]}
    with safe_open(folder / WHOLE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_saving_in_another_dtype_leaves_the_model_alone(model, tmp_path):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    # 400 bytes are a limit for what is written: 342 in bf16, though 676 in the model's fp32.
    save_model(model, tmp_path, dtype=torch.bfloat16, variant="bf16", max_shard_size=400)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [
        "diffusion_pytorch_model.bf16.safetensors"
    ]
    assert_same(load_model(Tiny, tmp_path, variant="bf16"), model, torch.bfloat16)


@pytest.mark.skipif(os.name != "posix", reason="needs file modes")
def test_weights_are_as_readable_as_their_config(model, tmp_path):
    old_mask = os.umask(0o027)
    try:
        save_model(model, tmp_path, max_shard_size=200)
    finally:
        os.umask(old_mask)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


def test_any_memory_layout_can_be_saved(model, tmp_path):
    model.conv.to(memory_format=torch.channels_last)
    save_model(model, tmp_path)
    assert_same(load_model(Tiny, tmp_path), model)


def test_saving_over_the_mapped_file_of_a_living_model(model, folder):
    loaded = load_model(Tiny, folder)
    with torch.no_grad():
        loaded.table.mul_(2.0)
    save_model(loaded, folder)
    save_model(Tiny(TinyConfig()), folder)
    assert torch.equal(loaded.table, 2 * model.table)  # its pages are still those of the file it came from


def test_a_new_save_leaves_no_files_of_the_old_one(model, tmp_path):
    for max_shard_size in (100, "5GB", 300, 100, 300):
        save_model(model, tmp_path, max_shard_size=max_shard_size)
        names = {path.name for path in tmp_path.iterdir()}
        index = tmp_path / INDEX
        listed = {INDEX, *json.loads(index.read_text())["weight_map"].values()} if index.exists() else {WHOLE}
        assert names == listed | {"config.json"}
        assert_same(load_model(Tiny, tmp_path), model)


def test_other_variants_and_files_stay(model, folder):
    for name in ("README.md", "model.safetensors"):  # the second is what transformers' models are called
        (folder / name).write_text("mine")
    save_model(model, folder, variant="bf16", dtype=torch.bfloat16, max_shard_size=100)
    save_model(model, folder)
    assert {(folder / name).read_text() for name in ("README.md", "model.safetensors")} == {"mine"}
    assert_same(load_model(Tiny, folder, variant="bf16"), model, torch.bfloat16)
    assert_same(load_model(Tiny, folder), model)


def test_a_write_that_fails_leaves_the_old_model(model, folder, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr("sana_sprint.weights.writing.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_model(Tiny(TinyConfig(width=9)), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("sizes", [(300, 300), (300, "5GB"), ("5GB", 300), (100, 300), ("5GB", "5GB")])
def test_a_reader_sees_the_old_model_or_the_new_or_an_error(model, tmp_path, monkeypatch, sizes):
    """Stop a save after every one of its renames and removals: no mixture of two models ever loads."""
    old, new = model, Tiny(TinyConfig())
    moves = {name: getattr(Path, name) for name in ("replace", "unlink")}
    seen = []

    def look():
        try:
            loaded = load_model(Tiny, tmp_path)
        except WeightsError:
            seen.append("error")
            return
        for name, whole in (("old", old), ("new", new)):
            if all(torch.equal(loaded.state_dict()[key], value) for key, value in whole.state_dict().items()):
                seen.append(name)
                return
        seen.append("mixture")

    def watched(name):
        def move(self, *args, **kwargs):
            result = moves[name](self, *args, **kwargs)
            look()
            return result

        return move

    save_model(old, tmp_path, max_shard_size=sizes[0])
    for name in moves:
        monkeypatch.setattr(Path, name, watched(name))
    save_model(new, tmp_path, max_shard_size=sizes[1])
    assert "mixture" not in seen
    assert seen[-1] == "new"
    assert ("error" in seen) == (sizes == (300, 300))  # only where shards keep their names is there a gap


def test_what_cannot_be_saved(model, tmp_path):
    with pytest.raises(WeightsError, match=r"published_class_name.*Linear"):
        save_model(nn.Linear(2, 2), tmp_path)
    with pytest.raises(WeightsError, match=r"torch\.int8"):
        save_model(model, tmp_path, dtype=torch.int8)
    with pytest.raises(WeightsError, match=r"'a\.b'"):
        save_model(model, tmp_path, variant="a.b")
    with pytest.raises(WeightsError, match="max_shard_size"):
        save_model(model, tmp_path, max_shard_size="much")
    with pytest.raises(WeightsError, match=r"meta device.*linear\.weight"):
        save_model(model.to("meta"), tmp_path)
    assert not list(tmp_path.iterdir())
