"""A teacher without QK norm and dense time is given both, and starts close to what it was."""

import math
from pathlib import Path

import pytest
import torch

from sana_sprint.models.layers import RMSNorm, ScalarEmbedder
from sana_sprint.models.transformer import SanaTransformer2DModel
from sana_sprint.train.models.adaptation import densify_time, with_qk_norm
from sana_sprint.train.stages.captions import embed
from sana_sprint.weights import load_model
from tests.helpers.models import tiny_transformer, transformer_inputs
from tests.helpers.training import adaptation_run, autoencoder_run, make, parse, teacher_run, train


def run(model: SanaTransformer2DModel) -> torch.Tensor:
    inputs = transformer_inputs(model.config, batch=3, grid=(4, 6))
    context = model.encode_caption(inputs["text"])
    return model(inputs["latent"], inputs["timestep"], context)


def test_new_norms_keep_the_size_of_queries_and_keys() -> None:
    teacher = tiny_transformer("plain")
    adapted = with_qk_norm(teacher, run)
    assert adapted.config.qk_norm == "rms_norm_across_heads"
    sizes: dict[str, tuple[float, float]] = {}

    def record(path: str):
        def hook(module, inputs, output):
            sizes[path] = (inputs[0].square().mean().sqrt().item(), output.square().mean().sqrt().item())

        return hook

    norms = {path: module for path, module in adapted.named_modules() if isinstance(module, RMSNorm)}
    norms = {path: module for path, module in norms.items() if "norm_q" in path or "norm_k" in path}
    assert len(norms) == 4 * teacher.config.num_layers
    # In the first block the inputs are the teacher's own; later ones see what the new norms changed.
    for path, module in norms.items():
        module.register_forward_hook(record(path))
    run(adapted)
    for path, (before, after) in sizes.items():
        if path.startswith("transformer_blocks.0.") and "attn1" in path:
            # The mean over tokens of their squares is the same; eps 1e-5 and fp32 rounding.
            assert after == pytest.approx(before, rel=1e-3), path


def test_all_other_weights_are_kept() -> None:
    teacher = tiny_transformer("plain")
    adapted = with_qk_norm(teacher, run).state_dict()
    for name, value in teacher.state_dict().items():
        torch.testing.assert_close(adapted[name], value, rtol=0, atol=0)


def test_a_model_with_norms_is_copied() -> None:
    teacher = tiny_transformer("teacher")

    def fail(_: object) -> None:
        raise AssertionError("nothing is to be measured")

    copy = with_qk_norm(teacher, fail)
    torch.testing.assert_close(run(copy), run(teacher), rtol=0, atol=0)
    assert copy is not teacher


@pytest.mark.parametrize("kind", ["plain", "teacher"])
def test_a_smooth_time_embedding_is_imitated(kind: str) -> None:
    model = tiny_transformer(kind)
    embedder = model.get_submodule("time_embed.emb.timestep_embedder")
    assert isinstance(embedder, ScalarEmbedder)
    # What a trained model has: it depends on time through at most a few radians. (Random weights would not.)
    frequency = torch.exp(-math.log(10_000) * torch.arange(128) / 128).repeat(2)
    with torch.no_grad():
        embedder.linear_1.weight[:, frequency * 1000 > 5] = 0
    times = torch.linspace(0, 1, 777)
    with torch.no_grad():
        old = embedder(1000 * times)
        error = densify_time(model)
        new = embedder(times)
    measured = ((new - old).square().mean().sqrt() / old.square().mean().sqrt()).item()
    assert measured == pytest.approx(error, rel=0.1)  # other times in the same interval
    # Measured 0.1% at this width; a fit that ignored time altogether would be off by tens of percent.
    assert measured < 0.01
    constant = ((old - old.mean(0)).square().mean().sqrt() / old.square().mean().sqrt()).item()
    assert constant > 0.1


def test_time_that_oscillates_is_smoothed_not_followed() -> None:
    """Random weights vary a thousand times over [0,1]; the dense embedding must not, whatever error that leaves."""
    model = tiny_transformer("plain")
    embedder = model.get_submodule("time_embed.emb.timestep_embedder")
    times = torch.linspace(0, 1, 2001)
    with torch.no_grad():
        old_variation = embedder(1000 * times).diff(dim=0).norm(dim=1).sum()
        error = densify_time(model)
        new_variation = embedder(times).diff(dim=0).norm(dim=1).sum()
    assert error > 0.1
    assert new_variation < old_variation / 10


@pytest.fixture(scope="module")
def old_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher without QK norm, of a few steps."""
    folder = tmp_path_factory.mktemp("old")
    train(autoencoder_run(folder / "autoencoder", steps=1))
    run = teacher_run(folder / "teacher", folder / "autoencoder" / "final", steps=2)
    del run["model"]["qk_norm"], run["model"]["timestep_scale"]
    train(run)
    return folder / "teacher" / "final"


def test_the_stage_fine_tunes_the_transformer_alone_and_exports_a_teacher(
    old_teacher: Path, tmp_path: Path
) -> None:
    train(adaptation_run(tmp_path / "run", old_teacher))
    final = tmp_path / "run" / "final"
    adapted = load_model(SanaTransformer2DModel, final / "transformer")
    assert adapted.config.qk_norm == "rms_norm_across_heads"
    assert adapted.config.time_scale == 1
    old = load_model(SanaTransformer2DModel, old_teacher / "transformer").state_dict()
    assert any(not torch.equal(adapted.state_dict()[name], value) for name, value in old.items())
    for part in ("text_encoder", "vae"):
        for file in (old_teacher / part).glob("*.safetensors"):
            assert (final / part / file.name).read_bytes() == file.read_bytes(), file
    # It is what a student run starts from, and an adaptation run too: it has all that it needs by now.
    again = parse(adaptation_run(tmp_path / "again", final))
    stage = make(again)
    embeddings = embed(stage.encoder, ["a red square"], instruction=False)
    u, s = torch.randn(1, 4, 4, 4), torch.tensor([0.4])
    context = adapted.encode_caption(embeddings.embeds, embeddings.mask)
    torch.testing.assert_close(
        stage.velocity(stage.transformer.encode_caption(embeddings.embeds, embeddings.mask))(u, s),
        adapted(u, s, context),
        rtol=0,
        atol=0,
    )
