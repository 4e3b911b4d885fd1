"""Recipes that fit together, a plan that is kept, and sets that are stored as they are made."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes.emoji3d import chain
from recipes.emoji3d.fetch import fetch
from recipes.emoji3d.store import store
from sana_sprint.models.autoencoder import AutoencoderConfig, AutoencoderDC
from sana_sprint.models.transformer import SanaTransformer2DModel, TransformerConfig
from sana_sprint.train.config import AutoencoderRun, StudentRun, TeacherRun, load_config
from sana_sprint.train.data import open_source
from sana_sprint.train.models.text_encoder import make_text_encoder
from sana_sprint.weights import load_model

SOURCE = "recipes.emoji3d.samples:everyday_128"


@pytest.mark.parametrize("side", chain.SIDES)
def test_every_stage_takes_what_an_earlier_one_makes(side: int) -> None:
    made = set[Path]()
    for stage in chain.stages(side):
        config = load_config(stage.recipe)
        assert config.output == stage.output
        for field in ("autoencoder", "teacher", "student", "controlnet", "start"):
            needed = getattr(config, field, None)
            if needed is not None and str(needed).startswith("runs/"):
                assert any(Path(needed).is_relative_to(folder) for folder in made), (stage.name, field)
        made.add(stage.output / "final")
    assert sum(chain.SHARES.values()) == pytest.approx(1)


@pytest.mark.parametrize("side", chain.SIDES)
def test_the_models_of_a_chain_fit_together_and_may_ship(side: int) -> None:
    configs = {stage.name: load_config(stage.recipe) for stage in chain.stages(side)}
    coder, teacher, student = (configs[name] for name in ("autoencoder", "teacher", "student"))
    assert isinstance(coder, AutoencoderRun)
    assert isinstance(teacher, TeacherRun)
    assert isinstance(student, StudentRun)
    assert student.discriminator is not None
    with torch.device("meta"):
        if coder.start is None:
            autoencoder = AutoencoderDC(AutoencoderConfig.from_dict(coder.model))
        else:
            autoencoder = load_model(AutoencoderDC, coder.start)
        transformer = SanaTransformer2DModel(TransformerConfig.from_dict(teacher.model))
        text_encoder = make_text_encoder(teacher.tokenizer_vocab, teacher.text_encoder)
    config = transformer.config
    assert config.in_channels == config.out_channels == autoencoder.config.latent_channels
    assert config.sample_size * autoencoder.spatial_compression_ratio == side
    assert config.caption_channels == text_encoder.config.hidden_size
    assert max(student.discriminator.blocks) < config.num_layers
    models = (autoencoder, transformer, text_encoder)
    parameters = sum(parameter.numel() for model in models for parameter in model.parameters())
    assert 2 * parameters < 80e6  # bytes in bf16, of all weights that ship


def test_there_is_no_chain_of_another_size() -> None:
    with pytest.raises(ValueError, match="one of"):
        chain.stages(64)


class Machine:
    """Stands for the training command: every stage finishes at so many samples a second, or is stopped."""

    def __init__(self, speed: float, stopped: Sequence[str] = ()) -> None:
        self.speed, self.stopped = speed, list(stopped)
        self.calls: list[tuple[str, int, bool]] = []

    def __call__(self, arguments: Sequence[str], stop_at: float) -> bool:
        recipe, *settings = arguments
        config = load_config(Path(recipe), settings)
        is_probe = config.output.name.endswith("-probe")
        self.calls.append((config.output.name, config.schedule.steps, is_probe))
        config.output.mkdir(parents=True, exist_ok=True)
        (config.output / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
        (config.output / "log.jsonl").write_text(json.dumps({"step": 1, "samples_per_s": self.speed}) + "\n")
        if config.output.name in self.stopped:
            self.stopped.remove(config.output.name)
            (config.output / "checkpoint-00000100.pt").write_bytes(b"saved")
            return False
        (config.output / "final").mkdir()
        (config.output / "final" / "config.json").write_text("{}")
        return True


def test_steps_fit_the_time_and_a_stopped_chain_goes_on_with_the_same_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    machine = Machine(speed=64.0, stopped=["teacher"])
    keep = tmp_path / "kept"
    assert not chain.run(128, 100, train=machine, stop_at=float("inf"), keep=keep)
    steps = {name: count for name, count, is_probe in machine.calls if not is_probe}
    # 42% of 100 minutes at one step of 64 samples a second; the probe itself took no time.
    assert steps["teacher"] == pytest.approx(2520, abs=2)
    assert (keep / "autoencoder" / "final" / "config.json").is_file()
    assert (keep / "teacher" / "checkpoint-00000100.pt").read_bytes() == b"saved"

    fresh = tmp_path / "another machine"
    fresh.mkdir()
    monkeypatch.chdir(fresh)
    chain.restore(128, keep)
    assert (fresh / "runs/emoji3d/128/teacher/checkpoint-00000100.pt").is_file()
    slower = Machine(speed=1.0)
    assert chain.run(128, 100, train=slower, stop_at=float("inf"), keep=keep)
    assert slower.calls[0] == ("teacher", steps["teacher"], False)
    assert [name for name, _, is_probe in slower.calls if not is_probe] == list(chain.SHARES)[1:]
    assert dict((name, count) for name, count, _ in slower.calls)["control-student"] == 100  # at least


def test_a_stored_set_holds_the_functions_samples(tmp_path: Path) -> None:
    assert store(SOURCE, tmp_path / "set", 5) == 1
    made, stored = open_source(SOURCE), open_source(str(tmp_path / "set"))
    for position in range(5):
        pixels, captions = made.sample(position)
        read, texts = stored.sample(position)
        assert np.array_equal(read, pixels)
        assert texts == tuple(dict.fromkeys(captions))


def test_fetch_takes_unpacked_folders(tmp_path: Path) -> None:
    artwork, data = tmp_path / "artwork", tmp_path / "data"
    (artwork / "assets").mkdir(parents=True)
    (data / "en").mkdir(parents=True)
    (artwork / "assets" / "1f431.webp").write_bytes(b"picture")
    (data / "en" / "data.json").write_text("[]")
    (data / "LICENSE").write_text("MIT")
    assert fetch(tmp_path / "target", artwork=artwork, data=data) == 1
    assert (tmp_path / "target" / "fluent" / "1f431.webp").read_bytes() == b"picture"
    with pytest.raises(FileNotFoundError, match="no assets"):
        fetch(tmp_path / "target", artwork=data, data=data)


def test_an_interrupted_store_goes_on(tmp_path: Path) -> None:
    store(SOURCE, tmp_path, 2)
    (path,) = tmp_path.glob("*.tar")
    before = path.stat().st_mtime_ns
    store(SOURCE, tmp_path, 2)
    assert path.stat().st_mtime_ns == before
    with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as archive:
        assert sorted(archive.getnames()) == ["00000000.png", "00000000.txt", "00000001.png", "00000001.txt"]
