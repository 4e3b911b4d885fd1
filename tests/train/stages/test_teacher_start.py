"""A teacher that goes on from a folder begins as that folder's model, and has no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sana_sprint.backends.prompt_cache import CachedPromptEncoder
from sana_sprint.models.text_encoder import load_text_encoder, load_tokenizer
from sana_sprint.models.transformer import SanaTransformer2DModel
from sana_sprint.train import loop
from sana_sprint.train.stages.captions import embed
from sana_sprint.train.stages.teacher import TeacherStage
from sana_sprint.weights import load_model
from tests.helpers.toy_stage import assert_same
from tests.helpers.training import chain as made_chain
from tests.helpers.training import make, parse, silent, teacher_run, train

OWN_MODELS = ("tokenizer_vocab", "text_encoder", "model")


@pytest.fixture
def chain() -> Path:
    return made_chain()


def started(output: Path, chain: Path, **settings: Any) -> dict[str, Any]:
    """A run that goes on from the chain's teacher."""
    values = teacher_run(output, chain / "autoencoder" / "final", **settings)
    for name in OWN_MODELS:
        del values[name]
    return {**values, "start": str(chain / "teacher" / "final")}


def test_its_first_predictions_are_the_folders(chain: Path, tmp_path: Path) -> None:
    folder = chain / "teacher" / "final"
    stage = make(parse(started(tmp_path / "run", chain)))
    assert isinstance(stage, TeacherStage)
    encoder = CachedPromptEncoder(
        load_tokenizer(folder / "tokenizer"), load_text_encoder(folder / "text_encoder")
    )
    transformer = load_model(SanaTransformer2DModel, folder / "transformer")
    captions = ["a red square", "a green square on something unheard of"]
    x, s = torch.randn(2, 4, 4, 4), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        expected, found = embed(encoder, captions, instruction=True), stage.embed(captions, instruction=True)
        assert torch.equal(found.embeds, expected.embeds)
        told = transformer.encode_caption(expected.embeds, expected.mask)
        predicted = stage.velocity(stage.context(torch.arange(2), found.embeds, found.mask))(x, s)
        assert torch.equal(predicted, transformer(x, s, told))
    assert predicted.any()  # a new one begins at zero


def test_everything_of_it_goes_on_learning(chain: Path, tmp_path: Path) -> None:
    stage = train(started(tmp_path / "run", chain, steps=2))
    assert isinstance(stage, TeacherStage)
    folder = chain / "teacher" / "final"
    for module, before in (
        (stage.transformer, load_model(SanaTransformer2DModel, folder / "transformer")),
        (stage.encoder.text_encoder, load_text_encoder(folder / "text_encoder")),
    ):
        old = before.state_dict()
        assert any(not torch.equal(old[name], value) for name, value in module.state_dict().items())
    tokenizer = "tokenizer/tokenizer.json"
    assert (tmp_path / "run" / "final" / tokenizer).read_bytes() == (folder / tokenizer).read_bytes()


def test_it_continues_where_it_was_stopped(chain: Path, tmp_path: Path) -> None:
    train(started(tmp_path / "whole", chain))
    stopped = parse(started(tmp_path / "stopped", chain))
    answers = iter([False, True])
    assert not loop.run(make(stopped), stopped, report=silent, should_stop=lambda: next(answers))
    loop.run(make(stopped), stopped, report=silent)
    assert_same(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("name", OWN_MODELS)
def test_models_of_its_own_beside_a_start_are_an_error(tmp_path: Path, name: str) -> None:
    own = teacher_run(tmp_path, tmp_path)
    with pytest.raises(ValueError, match=f"start has models of its own: leave out {name}"):
        parse({**started(tmp_path, tmp_path), name: own[name]})


@pytest.mark.parametrize("name", ["text_encoder", "model"])
def test_neither_is_an_error_too(tmp_path: Path, name: str) -> None:
    values = teacher_run(tmp_path, tmp_path)
    del values[name]
    with pytest.raises(ValueError, match="text_encoder and model are needed, or start"):
        parse(values)
