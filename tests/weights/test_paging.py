"""Memory that is given back is read again, and what was changed in memory is never lost."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sana_sprint import SanaSprintPipeline
from sana_sprint.models.autoencoder import AutoencoderDC
from sana_sprint.weights import load_model, paging, save_model
from tests.helpers.autoencoders import tiny_autoencoder

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="Linux gives memory back this way"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tiny_autoencoder(), tmp_path / "vae")
    return tmp_path / "vae"


def resident(folder: Path) -> int:
    """KiB of the folder's files that are in this process's memory."""
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            counts = len(words) > 5 and words[5].startswith(str(folder))
        elif counts and words[0] == "Rss:":
            total += int(words[1])
    return total


def contents(model: torch.nn.Module) -> list[torch.Tensor]:
    return [each.clone() for each in model.state_dict().values()]


def test_weights_leave_memory_and_come_back(folder: Path) -> None:
    model = load_model(AutoencoderDC, folder)
    before = contents(model)  # touches all pages
    assert resident(folder) > 0
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert paging.give_back(model) >= size
    assert resident(folder) == 0
    assert all(torch.equal(a, b) for a, b in zip(contents(model), before, strict=True))
    assert resident(folder) > 0


def test_a_change_in_memory_is_kept(folder: Path) -> None:
    model = load_model(AutoencoderDC, folder)
    with torch.no_grad():
        model.decoder.conv_in.weight.data.add_(1)  # leaves no trace that torch counts
    before = contents(model)
    assert paging.give_back(model) == 0
    assert all(torch.equal(a, b) for a, b in zip(contents(model), before, strict=True))


def test_weights_that_lie_in_no_file_stay(folder: Path) -> None:
    cast = load_model(AutoencoderDC, folder, dtype=torch.bfloat16)
    assert paging.give_back(cast) == 0
    assert paging.give_back(tiny_autoencoder()) == 0
    assert paging.give_back(torch.nn.Identity()) == 0


def test_other_systems_do_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(AutoencoderDC, folder)
    monkeypatch.setattr(paging, "sys", SimpleNamespace(platform="darwin"))
    assert paging.give_back(model) == 0


def test_a_pipeline_gives_each_component_back_after_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe: Any = SanaSprintPipeline.from_pretrained("emoji")
    pipe.set_progress_bar_config(disable=True)
    events: list[str] = []
    names = {id(part): name for name, part in pipe.components.items()}

    def noted(module: torch.nn.Module) -> int:
        events.append(names[id(module)])
        return paging.give_back(module)

    monkeypatch.setattr("sana_sprint.pipelines.base.give_back", noted)
    plain = pipe("a red heart", seed=1, output_type="pt").images
    assert events == []
    pipe.enable_disk_offload()
    for _ in range(2):
        assert torch.equal(pipe("a red heart", seed=1, output_type="pt").images, plain)
    assert events == 2 * ["text_encoder", "transformer", "vae"]
    pipe.enable_disk_offload(False)
    pipe("a red heart", seed=1)
    assert len(events) == 6


def test_the_embedded_model_is_mapped_and_leaves_memory() -> None:
    pipe: Any = SanaSprintPipeline.from_pretrained("emoji")
    pipe.set_progress_bar_config(disable=True)
    pipe("a red heart", seed=1)
    assert {
        name: paging.give_back(getattr(pipe, name)) > 0 for name in ("text_encoder", "transformer", "vae")
    } == {
        "text_encoder": True,
        "transformer": True,
        "vae": True,
    }
