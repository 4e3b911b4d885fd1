"""The recipes of the published sizes: valid, and one real step of each player on random weights (slow, by hand)."""

from pathlib import Path

import pytest
import torch

from sana_sprint.models.autoencoder import AutoencoderConfig, AutoencoderDC
from sana_sprint.models.transformer import SanaTransformer2DModel, TransformerConfig
from sana_sprint.train.config import StudentRun, load_config
from sana_sprint.train.models.text_encoder import make_text_encoder, save_text, train_tokenizer
from sana_sprint.train.stages.student import StudentStage
from sana_sprint.train.trainer import Trainer
from sana_sprint.weights import save_model
from tests.helpers.autoencoders import PUBLISHED_AUTOENCODER
from tests.helpers.models import PUBLISHED_TRANSFORMERS

RECIPES = Path(__file__).parents[3] / "recipes" / "sprint"


def test_recipes_say_what_was_released() -> None:
    for path in RECIPES.glob("student-*.toml"):
        run = load_config(path)
        assert isinstance(run, StudentRun)
        assert run.discriminator is not None
        assert run.discriminator.blocks == (2, 8, 14, 19)
        for optimizer in run.optimizers:
            assert (optimizer.name, optimizer.learning_rate, optimizer.clip_norm) == ("came", 2e-6, 0.1)
        assert (run.schedule.batch_size, run.schedule.steps) == (512, 40_000)
        assert run.guidance_scales == (4.0, 4.5, 5.0)
    assert len(list(RECIPES.glob("student-*.toml"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("size", ["0.6b", "1.6b"])
def test_one_step_of_each_player(size: str, tmp_path: Path) -> None:
    if size == "1.6b" and not torch.cuda.is_available():
        pytest.skip("needs 40 GB; without a GPU only the 0.6B model is tried")
    teacher = tmp_path / "teacher"
    make_teacher(teacher, size)
    run = load_config(
        RECIPES / f"student-{size}.toml",
        [
            f"output={tmp_path / 'run'}",
            f"teacher={teacher}",
            "data.source=tests.helpers.training:colored_square",
            "data.num_samples=4",
            "data.size=64",
            "schedule.batch_size=2",
            "optimizer.warmup_steps=0",
        ],
    )
    assert isinstance(run, StudentRun)
    stage = StudentStage(run, report=lambda line: None)
    trainer = Trainer(stage, run)
    for step, name in enumerate(("student", "discriminator")):
        parameters = [p for p in stage.players[name].parameters() if p.ndim > 1]
        before = [parameter.detach().clone() for parameter in parameters]
        metrics = trainer.step(step)
        assert all(torch.isfinite(torch.tensor(value)) for value in metrics.values()), metrics
        moved = sum(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
        # At rate 2e-6 even fp32 weights of size 1 move; what receives no gradient in the first step does not.
        assert moved > 0.9 * len(parameters), (name, moved, len(parameters))


def make_teacher(folder: Path, size: str) -> None:
    """A published teacher's folder in shape, with random weights and a one-layer text encoder of the real width."""
    values = PUBLISHED_TRANSFORMERS[f"teacher_{size}"][0]
    config = TransformerConfig(**values, timestep_scale=0.001)  # as the published teachers say it
    save_model(SanaTransformer2DModel(config), folder / "transformer", dtype=torch.bfloat16)
    autoencoder = AutoencoderDC(AutoencoderConfig.from_dict(PUBLISHED_AUTOENCODER))
    save_model(autoencoder, folder / "vae", dtype=torch.bfloat16)
    tokenizer = train_tokenizer(["a red square", "a blue square"], 400)
    settings = {
        "hidden_size": config.caption_channels,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
    }
    save_text(tokenizer, make_text_encoder(len(tokenizer), settings), folder)
