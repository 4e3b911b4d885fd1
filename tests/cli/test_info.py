"""`sana-sprint info`: what a folder holds, told without loading it."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from sana_sprint.cli.info import readable_bytes
from sana_sprint.models.autoencoder import AutoencoderDC
from sana_sprint.models.controlnet import SanaControlNetModel
from sana_sprint.weights import load_model, save_model
from tests.helpers.cli import assert_refused, call, save_tiny_model, succeed
from tests.helpers.pipeline import tiny_pipeline


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory)


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model's folder, free to be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def told(model: object) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(succeed("info", model, "--json"))
    return facts


def write_weights(path: Path, shapes: dict[str, list[int]], *, data_bytes: int | None = None) -> None:
    """A safetensors file of fp16 zeros, as large as its header says or as told; zeros take no room on disk."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = 2
        for side in shape:
            size *= side
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + (end if data_bytes is None else data_bytes))


def test_a_pipeline_is_told_as_it_is(tiny):
    facts, pipeline = told(tiny), tiny_pipeline()
    assert facts["model"] == facts["folder"] == str(tiny)
    assert facts["pipeline"] == "SanaSprintPipeline"
    assert facts["native_size"] == 32
    parts = facts["components"]
    assert set(parts) == {"scheduler", "text_encoder", "tokenizer", "transformer", "vae"}
    for name in ("text_encoder", "transformer", "vae"):
        module = getattr(pipeline, name)
        count = sum(parameter.numel() for parameter in module.parameters())
        assert parts[name]["parameters"] == count
        assert parts[name]["dtypes"] == {"float32": count}
        assert parts[name]["class_name"] == getattr(module, "published_class_name", "Gemma2Model")
    assert parts["scheduler"]["parameters"] == 0
    assert facts["parameters"] == sum(part["parameters"] for part in parts.values())
    on_disk = sum(path.stat().st_size for path in tiny.rglob("*") if path.is_file() and path.parent != tiny)
    assert facts["bytes"] == on_disk


def test_the_table_shows_the_same(tiny):
    facts, lines = told(tiny), succeed("info", tiny).splitlines()
    assert "picture     32x32" in lines
    assert f"parameters  {facts['parameters']:,}" in lines
    (row,) = [line.split() for line in lines if line.startswith("vae")]
    part = facts["components"]["vae"]
    assert row == [
        "vae",
        "AutoencoderDC",
        f"{part['parameters']:,}",
        "float32",
        *readable_bytes(part["bytes"]).split(),
    ]


def test_a_single_component(tiny):
    facts = told(tiny / "vae")
    assert (facts["pipeline"], facts["native_size"], list(facts["components"])) == (None, None, ["vae"])
    assert facts["components"]["vae"] == told(tiny)["components"]["vae"]
    assert told(tiny / "text_encoder")["components"]["text_encoder"]["class_name"] == "Gemma2Model"


def test_a_controlnet_is_told_though_it_is_not_listed(copy):
    before = told(copy)
    branch = SanaControlNetModel.from_transformer(tiny_pipeline().transformer, num_layers=1)
    save_model(branch, copy / "controlnet")
    after = told(copy)
    part = after["components"]["controlnet"]
    count = sum(parameter.numel() for parameter in branch.parameters())
    assert (part["class_name"], part["parameters"]) == ("SanaControlNetModel", count)
    assert after["parameters"] == before["parameters"] + count
    assert after["pipeline"] == before["pipeline"]
    assert any(line.startswith("controlnet  ") for line in succeed("info", copy).splitlines())


def test_shards_and_variants_count_once(copy):
    import torch

    before = told(copy)["components"]["vae"]
    vae = load_model(AutoencoderDC, copy / "vae")
    save_model(vae, copy / "vae", max_shard_size="20KB")
    assert len(list((copy / "vae").glob("*.safetensors"))) > 1
    save_model(vae, copy / "vae", variant="zz", dtype=torch.bfloat16)  # sorts after the plain files' names
    after = told(copy)["components"]["vae"]
    assert after["parameters"] == before["parameters"]
    assert after["dtypes"] == before["dtypes"]
    assert after["variants"] == ["zz"]
    assert "float32, variant zz" in succeed("info", copy)


def test_weights_are_not_read(copy):
    # 20 GB that exist in the header only: reading them would take minutes, and holding them more memory than there is.
    write_weights(copy / "vae" / "diffusion_pytorch_model.safetensors", {"a": [100_000, 100_000], "b": []})
    part = told(copy)["components"]["vae"]
    assert (part["parameters"], part["dtypes"]) == (10**10 + 1, {"float16": 10**10 + 1})


def test_a_part_that_the_pipeline_does_without_is_no_fault(copy):
    index = copy / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"text_encoder": [None, None]}))
    assert "text_encoder" not in told(copy)["components"]


def _cut(vae: Path) -> None:
    weights = vae / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


def _pointer(vae: Path) -> None:
    (vae / "diffusion_pytorch_model.safetensors").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid x"
    )


def _shard_lost(vae: Path) -> None:
    save_model(load_model(AutoencoderDC, vae), vae, max_shard_size="20KB")
    next(vae.glob("*.safetensors")).unlink()


def _header(vae: Path) -> None:
    (vae / "diffusion_pytorch_model.safetensors").write_bytes(struct.pack("<Q", 10) + b"[1, 2, 3] ")


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (shutil.rmtree, "no folder"),
        (_cut, "its header says"),
        (_pointer, "git-lfs pointer"),
        (_shard_lost, "1 missing"),
        (_header, "not safetensors"),
        (lambda vae: (vae / "diffusion_pytorch_model.safetensors").unlink(), "no safetensors weights"),
    ],
)
def test_damage_is_told_after_everything_else(copy, damage, word):
    damage(copy / "vae")
    result = call("info", copy, "--json")
    assert result.exit_code == 1
    facts = json.loads(result.stdout)
    assert [name for name, part in facts["components"].items() if part["problems"]] == ["vae"]
    assert word in facts["components"]["vae"]["problems"][0]
    error, hint = result.stderr.splitlines()
    assert error.startswith("error: ")
    assert word in error
    assert hint.startswith("hint: ")


def test_no_model(tmp_path):
    assert_refused(call("info", tmp_path), 1, "model_index.json")
    assert_refused(call("info", "nonsense"), 1, "nonsense")
    assert_refused(call("info"), 2, "missing argument")


def test_a_hub_model_is_only_fetched_on_request(monkeypatch, tiny):
    import huggingface_hub

    def fetch(repo_id: str, *, local_files_only: bool, **_: object) -> str:
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        return str(tiny)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    result = call("info", "owner/name")
    assert_refused(result, 1, "hint: fetch it with `sana-sprint info owner/name --download`")
    assert f"folder      {tiny}\n" in succeed("info", "owner/name", "--download")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_234_567, "1.2 MB"),
        (3.2e9, "3.2 GB"),
        (5e15, "5000.0 TB"),
    ],
)
def test_readable_bytes(count, text):
    assert readable_bytes(int(count)) == text
