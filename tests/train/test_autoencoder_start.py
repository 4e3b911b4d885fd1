"""An autoencoder run that goes on from a folder begins as that folder's model, and has no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sana_sprint.models.autoencoder import AutoencoderDC
from sana_sprint.train.stages.autoencoder import AutoencoderStage
from sana_sprint.weights import load_model
from tests.helpers.training import autoencoder_run, make, parse, train
from tests.helpers.training import chain as made_chain


@pytest.fixture
def folder() -> Path:
    return made_chain() / "autoencoder" / "final"


def started(output: Path, folder: Path) -> dict[str, Any]:
    """A run that goes on from a folder."""
    values = autoencoder_run(output, steps=2)
    del values["model"]
    return {**values, "start": str(folder)}


def test_its_first_reconstructions_are_the_folders(folder: Path, tmp_path: Path) -> None:
    stage = make(parse(started(tmp_path / "run", folder)))
    assert isinstance(stage, AutoencoderStage)
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        found = stage.module.decode(stage.module.encode(image))
        model = load_model(AutoencoderDC, folder)
        torch.testing.assert_close(found, model.decode(model.encode(image)))


def test_all_of_it_goes_on_learning(folder: Path, tmp_path: Path) -> None:
    train(started(tmp_path / "run", folder))
    before = dict(load_model(AutoencoderDC, folder).named_parameters())
    after = dict(load_model(AutoencoderDC, tmp_path / "run" / "final").named_parameters())
    assert after.keys() == before.keys()
    assert not [name for name in after if torch.equal(after[name], before[name])]


def test_a_model_beside_a_start_and_neither_are_errors(folder: Path, tmp_path: Path) -> None:
    values = started(tmp_path, folder)
    model = autoencoder_run(tmp_path)["model"]
    del values["start"]
    for wrong in (values, {**values, "model": model, "start": str(folder)}):
        with pytest.raises(ValueError, match="either model or start is needed, and not both"):
            parse(wrong)
