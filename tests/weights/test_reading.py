"""Reading model folders: all of what was written, or one clear error that names the file."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sana_sprint.weights import WeightsError, available_variants, load_model, save_model
from tests.helpers.weights import INDEX, WHOLE, Tiny, assert_same, edit_json, rewrite


def load_error(folder, **options):
    with pytest.raises(WeightsError) as caught:
        load_model(Tiny, folder, **options)
    assert str(folder) in str(caught.value)  # every message says where
    return str(caught.value)


def test_round_trip_is_bitwise(model, folder):
    loaded = load_model(Tiny, folder)
    assert_same(loaded, model)
    assert loaded.config == model.config
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_weights_start_on_meta_and_come_from_the_files(folder):
    loaded = load_model(Tiny, folder)
    assert loaded.made_on["linear.weight"] == loaded.made_on["conv.bias"] == loaded.made_on["table"] == "meta"
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))


def test_loading_draws_no_random_numbers(folder):
    before = torch.get_rng_state()
    load_model(Tiny, folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_buffer_that_nothing_can_fill_is_a_programming_error(folder):
    class Unfillable(Tiny):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("unset", torch.empty(3), persistent=False)

    with pytest.raises(AssertionError, match="unset"):
        load_model(Unfillable, folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_casts_what_the_file_holds_and_nothing_else(model, folder, dtype):
    loaded = load_model(Tiny, folder, dtype=dtype)
    assert_same(loaded, model, dtype)
    assert loaded.norm.num_batches_tracked.dtype == torch.int64


def test_without_dtype_each_tensor_keeps_its_own(model, folder):
    rewrite(folder / WHOLE, lambda tensors: tensors.update(table=tensors["table"].bfloat16()))
    loaded = load_model(Tiny, folder)
    assert loaded.table.dtype == torch.bfloat16
    assert loaded.linear.weight.dtype == torch.float32


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
def test_parameters_are_views_of_the_mapped_file(folder):
    def is_in_the_file(parameter):
        maps = Path("/proc/self/maps").read_text().splitlines()
        ranges = [line.split()[0].split("-") for line in maps if line.endswith(str(folder / WHOLE))]
        return any(int(low, 16) <= parameter.data_ptr() < int(high, 16) for low, high in ranges)

    assert all(map(is_in_the_file, load_model(Tiny, folder).parameters()))
    cast = load_model(Tiny, folder, dtype=torch.bfloat16)
    assert not any(map(is_in_the_file, cast.parameters()))


def test_training_a_loaded_model_does_not_change_its_file(model, folder):
    before = (folder / WHOLE).read_bytes()
    loaded = load_model(Tiny, folder)
    with torch.no_grad():
        loaded.linear.weight.add_(1.0)
    assert (folder / WHOLE).read_bytes() == before
    assert_same(load_model(Tiny, folder), model)


def test_every_difference_is_in_one_error(folder):
    def change(tensors):
        del tensors["linear.weight"]
        tensors["extra.weight"] = torch.zeros(1)
        tensors["table"] = torch.zeros(3, 6)
        tensors["conv.bias"] = torch.zeros(3, dtype=torch.int8)

    rewrite(folder / WHOLE, change)
    message = load_error(folder)
    assert str(folder / WHOLE) in message
    assert "1 missing: linear.weight" in message
    assert "1 unexpected: extra.weight" in message
    assert "2 of another shape or kind" in message
    assert "table is (3, 6), the model's (2, 6)" in message
    assert "conv.bias is I8, the model's torch.float32" in message


def test_long_lists_of_keys_are_cut(folder):
    rewrite(folder / WHOLE, lambda tensors: tensors.update({f"x{i}": torch.zeros(1) for i in range(99)}))
    message = load_error(folder)
    assert "99 unexpected" in message
    assert "..." in message
    assert len(message) < 600


def whole_file(content):
    return lambda folder: (folder / WHOLE).write_bytes(content)


def truncate(folder):
    data = (folder / WHOLE).read_bytes()
    (folder / WHOLE).write_bytes(data[:-1])


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (truncate, "truncated"),
        (whole_file(b""), "0 bytes"),
        (whole_file(b"\x10\0\0\0\0\0\0\0not really json"), "truncated or not safetensors"),
        (whole_file(b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"), "git lfs pull"),
        (whole_file(b"<!DOCTYPE html><html><body>Sign in</body></html>"), "web page"),
        (whole_file(b"PK\x03\x04" + b"\0" * 60), "torch.save"),
        (whole_file(b"\x80\x04\x95" + b"\0" * 60), "pickle"),
    ],
)
def test_a_file_that_is_not_safetensors(folder, break_it, expected):
    break_it(folder)
    message = load_error(folder)
    assert WHOLE in message
    assert expected in message


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda folder: edit_json(folder / "config.json", _class_name="Other"), "expected: 'TinyPublished'"),
        (lambda folder: edit_json(folder / "config.json", depth=3), "depth"),
        (lambda folder: edit_json(folder / "config.json", width=1), "width must be at least 2, got: 1"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("<html>"), "web page"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"), "not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "JSON object"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_a_config_that_does_not_describe_the_model(folder, break_it, expected):
    break_it(folder)
    message = load_error(folder)
    assert expected in message


def test_an_absent_variant_lists_what_there_is(model, folder):
    save_model(model, folder, variant="bf16", dtype=torch.bfloat16)
    assert available_variants(folder) == (None, "bf16")
    message = load_error(folder, variant="fp16")
    assert "variants there: None, 'bf16'" in message
    assert "diffusion_pytorch_model.fp16.safetensors" in message


@pytest.mark.parametrize("suffix", [".bin", ".pth", ".pt", ".ckpt"])
def test_pickles_are_refused_by_name(folder, suffix):
    (folder / WHOLE).rename(folder / f"diffusion_pytorch_model{suffix}")
    assert "only pickles, which are never read" in load_error(folder)


def test_a_folder_without_any_weights(folder):
    (folder / WHOLE).unlink()
    assert "no safetensors files" in load_error(folder)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"device": "gpu9"}, "device 'gpu9'"),
        ({"device": "meta"}, "holds no weights"),
        ({"dtype": torch.int8}, "torch.int8"),
        ({"variant": "../x"}, "'../x'"),
    ],
)
def test_bad_arguments(folder, options, expected):
    with pytest.raises(WeightsError, match=re.escape(expected)):
        load_model(Tiny, folder, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", torch.device("cuda", 0)])
def test_an_absent_device_is_an_error_that_names_it(folder, device):
    with pytest.raises(WeightsError, match=r"device 'cuda.*does not work here"):
        load_model(Tiny, folder, device=device)


@pytest.mark.gpu
def test_everything_goes_to_the_gpu(model, folder):
    loaded = load_model(Tiny, folder, device="cuda", dtype=torch.bfloat16)
    assert {t.device.type for t in (*loaded.parameters(), *loaded.buffers())} == {"cuda"}
    assert_same(loaded.cpu(), model, torch.bfloat16)


# Shards and variants


@pytest.fixture
def shards(model, tmp_path):
    save_model(model, tmp_path / "shards", max_shard_size=200)  # bytes; the whole is 676
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) >= 3
    return tmp_path / "shards"


def test_shards_load_whole(model, shards):
    assert not (shards / WHOLE).exists()
    assert_same(load_model(Tiny, shards), model)
    index = json.loads((shards / INDEX).read_text())
    assert index["weight_map"].keys() == model.state_dict().keys()
    for key, name in index["weight_map"].items():
        with safe_open(shards / name, framework="pt") as file:
            assert key in file.keys()  # noqa: SIM118  (not a mapping)


def test_a_missing_shard_is_named(shards):
    gone = sorted(shards.glob("*.safetensors"))[1]
    gone.unlink()
    message = load_error(shards)
    assert "1 missing" in message
    assert gone.name in message


def test_a_shard_without_its_tensors_is_missing_keys(model, shards):
    victim = sorted(shards.glob("*.safetensors"))[1]
    keys = sorted(load_file(victim))

    def change(tensors):
        tensors.clear()
        tensors["x"] = torch.ones(1)

    rewrite(victim, change)
    message = load_error(shards)
    assert f"{len(keys)} missing: " in message
    assert any(key in message for key in keys)
    assert "1 unexpected: x" in message


def test_a_truncated_shard_is_named(shards):
    victim = sorted(shards.glob("*.safetensors"))[-1]
    victim.write_bytes(victim.read_bytes()[:-4])
    assert f"{victim.name} is truncated" in load_error(shards)


def test_a_key_in_two_shards_is_an_error(shards):
    first, second = sorted(shards.glob("*.safetensors"))[:2]
    key = next(iter(load_file(first)))
    rewrite(second, lambda tensors: tensors.update({key: torch.zeros(1)}))
    assert f"repeats keys of another shard: {key}" in load_error(shards)


@pytest.mark.parametrize("name", ["../model/" + WHOLE, "/etc/passwd", "diffusion_pytorch_model.bin"])
def test_an_index_may_not_point_elsewhere(folder, shards, name):
    edit_json(shards / INDEX, weight_map={"table": name})
    assert "may only name .safetensors files of its own folder" in load_error(shards)


@pytest.mark.parametrize("weight_map", [{}, [], None])
def test_an_index_without_a_map(shards, weight_map):
    edit_json(shards / INDEX, weight_map=weight_map)
    assert "weight_map" in load_error(shards)


@pytest.mark.parametrize(
    ("index", "shard"),
    [
        (
            "diffusion_pytorch_model.safetensors.index.fp16.json",
            "diffusion_pytorch_model.fp16-{n}.safetensors",
        ),
        (
            "diffusion_pytorch_model.safetensors.fp16.index.json",
            "diffusion_pytorch_model-{n}.fp16.safetensors",
        ),
        (
            "diffusion_pytorch_model.fp16.safetensors.index.json",
            "diffusion_pytorch_model.fp16-{n}.safetensors",
        ),
    ],
)
def test_every_spelling_of_a_sharded_variant(model, shards, index, shard):
    renamed = {}
    for path in sorted(shards.glob("*.safetensors")):
        number = path.stem.removeprefix("diffusion_pytorch_model-")
        renamed[path.name] = shard.format(n=number)
        path.rename(shards / renamed[path.name])
    weight_map = json.loads((shards / INDEX).read_text())["weight_map"]
    edit_json(shards / INDEX, weight_map={key: renamed[name] for key, name in weight_map.items()})
    (shards / INDEX).rename(shards / index)
    assert available_variants(shards) == ("fp16",)
    assert_same(load_model(Tiny, shards, variant="fp16"), model)
    assert "variants there: 'fp16'" in load_error(shards)  # the plain files are not there

    save_model(model, shards, variant="fp16")  # and writing replaces them, whatever their spelling was
    assert sorted(os.listdir(shards)) == ["config.json", "diffusion_pytorch_model.fp16.safetensors"]
