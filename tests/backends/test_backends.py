"""Putting speed on models and taking it off: what stays as it is, and what may happen to the models in between."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sana_sprint import SanaSprintPipeline, backends
from sana_sprint.backends.cuda.graphs import StepGraphs
from sana_sprint.models.autoencoder import AutoencoderDC
from sana_sprint.quantize.models import quantize_model
from sana_sprint.weights import load_model, save_model
from tests.helpers.autoencoders import tiny_autoencoder
from tests.helpers.graphs import FakeRecorder
from tests.helpers.models import tiny_transformer, transformer_inputs
from tests.helpers.pipeline import PROMPT, tiny_pipeline

MODELS: dict[str, Callable[[], Any]] = {
    "autoencoder": lambda: tiny_autoencoder("published"),
    "transformer": tiny_transformer,
}


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


@torch.no_grad()
def run(model: Any) -> Tensor:
    if isinstance(model, AutoencoderDC):
        picture = torch.linspace(-1, 1, 3 * 16 * 12).view(1, 3, 16, 12).to(model.dtype)
        return model(picture)
    inputs = transformer_inputs(model.config)
    context = model.encode_caption(inputs["text"], inputs["text_mask"])
    return model(inputs["latent"], inputs["timestep"], context, inputs["guidance"])


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def test_applying_changes_classes_only_and_removing_brings_the_plain_model_back(model):
    plain, state, names = classes(model), model.state_dict(), [name for name, _ in model.named_modules()]
    expected = run(model)
    assert backends.apply(model) is model
    fast = classes(model)
    assert fast != plain
    assert [name for name, _ in model.named_modules()] == names
    assert all(
        value is model.state_dict()[key] or torch.equal(value, model.state_dict()[key])
        for key, value in state.items()
    )
    found = run(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    backends.apply(model)  # again: nothing changes
    assert classes(model) == fast
    assert torch.equal(run(model), found)
    backends.use_kernels(model, False)  # never put on
    assert classes(model) == fast
    assert backends.remove(model) is model
    assert classes(model) == plain
    assert torch.equal(run(model), expected)
    backends.remove(model)
    assert classes(model) == plain


def test_a_fast_model_may_be_copied_moved_cast_and_saved(model, tmp_path):
    backends.apply(model)
    expected = run(model)
    for other in (copy.deepcopy(model), copy.copy(model)):
        assert classes(other) == classes(model)
        assert torch.equal(run(other), expected)
    assert torch.equal(run(copy.deepcopy(model).double().float()), expected)
    save_model(model, tmp_path)
    kind = AutoencoderDC if isinstance(model, AutoencoderDC) else type(tiny_transformer())
    loaded = load_model(kind, tmp_path)
    assert type(loaded) is kind  # a file says nothing about speed
    # Weights that lie elsewhere in memory may be summed in another order.
    torch.testing.assert_close(run(backends.apply(loaded)), expected, rtol=1e-4, atol=1e-4)


def test_hooks_and_changes_of_weights_are_seen(model):
    backends.apply(model)
    expected, seen = run(model), []
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda module, _inputs, _output: seen.append(module))
    assert torch.equal(run(model), expected)
    assert seen
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    torch.testing.assert_close(run(model), run(backends.remove(copy.deepcopy(model))), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(run(model), expected)


@pytest.mark.parametrize("first", ["quantised", "applied"])
def test_quantised_models_are_served_in_either_order(first):
    model = tiny_autoencoder("published")
    plain = run(model)
    steps = [lambda: quantize_model(model, "vae", "int8-weights"), lambda: backends.apply(model)]
    for step in steps if first == "quantised" else steps[::-1]:
        step()
    found = run(model)
    assert 0 < (found - plain).abs().max() < 0.2 * plain.abs().max()
    torch.testing.assert_close(run(backends.remove(model)), found, rtol=1e-3, atol=1e-3)


def test_a_lora_is_met_by_fast_layers():
    model = backends.apply(tiny_transformer())
    before = run(model)
    layer = model.blocks[0].attn1.to_q
    with torch.no_grad():
        layer.weight = nn.Parameter(layer.weight + 0.5)  # as a merged LoRA replaces it
    assert not torch.allclose(run(model), before)
    assert torch.equal(run(model), run(backends.apply(backends.remove(copy.deepcopy(model)))))


def test_a_pipeline_puts_the_default_on_what_it_is_given():
    pipe = tiny_pipeline()
    assert classes(pipe.vae) == classes(backends.apply(copy.deepcopy(pipe.vae)))
    assert type(pipe.vae) is not AutoencoderDC
    vae, transformer = tiny_pipeline().vae, backends.remove(copy.deepcopy(pipe.transformer))
    pipe.vae, pipe.transformer = backends.remove(vae), transformer  # also later
    assert type(pipe.vae) is not AutoencoderDC
    assert classes(transformer) == classes(tiny_pipeline().transformer)


def test_pipelines_that_share_models_agree(tmp_path: Path):
    one = tiny_pipeline()
    expected = one(PROMPT, seed=1, output_type="pt").images
    before = classes(one.vae), classes(one.transformer)
    other = SanaSprintPipeline(**one.components)
    assert (classes(one.vae), classes(one.transformer)) == before
    for pipe in (other, one, SanaSprintPipeline.from_pipe(one)):
        assert torch.equal(pipe(PROMPT, seed=1, output_type="pt").images, expected)
    one.save_pretrained(tmp_path)
    again = SanaSprintPipeline.from_pretrained(tmp_path)
    found = again(PROMPT, seed=1, output_type="pt").images
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # weights lie elsewhere in memory


@torch.no_grad()
def test_another_class_of_a_layer_is_recorded_anew():
    model = backends.apply(tiny_transformer())
    recorder = FakeRecorder()
    backends.record(model, StepGraphs(record=recorder, device_type="cpu"))
    first = run(model)
    recorded = recorder.recorded
    assert torch.equal(run(model), first)
    assert recorder.recorded == recorded
    for block in model.blocks:
        backends.remove(block)
    torch.testing.assert_close(run(model), first, rtol=1e-5, atol=1e-5)
    assert recorder.recorded > recorded
    backends.remove(model)
    assert backends.recordings(model) is None
