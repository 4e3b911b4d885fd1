"""The control branch: against the published one, its folders, what it leaves alone and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from sana_sprint.models.controlnet import ControlNetConfig, SanaControlNetModel
from sana_sprint.models.transformer import SanaTransformer2DModel
from sana_sprint.weights import WeightsError, load_model, save_model
from tests.helpers.models import TRANSFORMERS, randomize, tiny_transformer, transformer_inputs

# Both sides round fp32 in different orders, measured at 2e-6 of the output's rms. A residual one block early or late, or
# of the wrong scale, moves the output by 1e-2 and more.
FP32_TOLERANCE = 1e-4
TOPOLOGIES = ["diffusers", "official"]
# The published branch has neither QK norm nor guidance embedding; its base may have both.
PLAIN = ["plain", "positions", "biases_and_affine", "patch2", "sprint"]


def plain_branch(name: str, **changes: Any) -> dict[str, Any]:
    """Fields of the published branch for the transformer of that name, with two copies."""
    values = {**TRANSFORMERS[name], "num_layers": 2, **changes}
    return {
        key: values[key]
        for key in values
        if key not in ("qk_norm", "guidance_embeds", "guidance_embeds_scale")
    }


def branch(base: SanaTransformer2DModel, topology: str, seed: int = 5, **values: Any) -> SanaControlNetModel:
    """A randomised branch of the base's kind, with two copies."""
    model = SanaControlNetModel.from_transformer(base, num_layers=2, topology=topology)
    randomize(model, seed)
    return model.eval()


def control_latent(inputs: dict[str, Tensor]) -> Tensor:
    return torch.randn(inputs["latent"].shape, generator=torch.Generator().manual_seed(9))


def evaluate(
    base: SanaTransformer2DModel,
    inputs: dict[str, Tensor],
    controlnet: SanaControlNetModel | None = None,
    scale: float = 1.0,
) -> Tensor:
    captions = base.encode_caption(inputs["text"], inputs["text_mask"])
    guidance = inputs["guidance"] if base.config.guidance_embeds else None
    control = None
    if controlnet is not None:
        context = controlnet.encode(base, control_latent(inputs), inputs["text"], inputs["text_mask"])
        control = controlnet.steer(inputs["latent"], inputs["timestep"], context, guidance, scale)
    output: Tensor = base(inputs["latent"], inputs["timestep"], captions, guidance, control)
    return output


def relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).abs().max() / reference.square().mean().sqrt())


# --- Against the published branch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("name", PLAIN)
@torch.no_grad()
def test_outputs_equal_the_published_pair(name: str, scale: float) -> None:
    fields = plain_branch(name)
    theirs = diffusers.SanaControlNetModel(**fields).eval()
    randomize(theirs, seed=5)
    ours = SanaControlNetModel(ControlNetConfig(**fields)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    base = tiny_transformer(name)
    published = diffusers.SanaTransformer2DModel(**TRANSFORMERS[name]).eval()
    published.load_state_dict(base.state_dict(), strict=True)

    inputs = transformer_inputs(base.config, batch=3, grid=(6, 10))
    shared = {
        "encoder_hidden_states": inputs["text"],
        "encoder_attention_mask": inputs["text_mask"],
        "timestep": inputs["timestep"],
        "return_dict": False,
    }
    guidance = inputs["guidance"] * base.config.guidance_embeds_scale if base.config.guidance_embeds else None
    samples = theirs(
        inputs["latent"], controlnet_cond=control_latent(inputs), conditioning_scale=scale, **shared
    )[0]
    expected = published(
        inputs["latent"], guidance=guidance, controlnet_block_samples=tuple(samples), **shared
    )[0]

    assert relative_error(evaluate(base, inputs, ours, scale), expected) < FP32_TOLERANCE
    assert relative_error(evaluate(base, inputs), expected) > 0.01  # the branch matters


def test_keys_and_shapes_of_the_published_size() -> None:
    with torch.device("meta"):
        theirs = diffusers.SanaControlNetModel()
        ours = SanaControlNetModel(ControlNetConfig())
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }


def test_a_published_folder_loads_and_ours_is_the_same(tmp_path: Path) -> None:
    theirs = diffusers.SanaControlNetModel(**plain_branch("plain"))
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(SanaControlNetModel, tmp_path / "theirs")
    save_model(ours, tmp_path / "ours")

    back = diffusers.SanaControlNetModel.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in theirs.state_dict().items())
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours")]
    assert configs[0] == configs[1]


# --- Our own forms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", TOPOLOGIES)
@torch.no_grad()
def test_a_new_branch_leaves_the_base_bit_identical(topology: str) -> None:
    base = tiny_transformer("sprint")
    controlnet = SanaControlNetModel.from_transformer(base, num_layers=2, topology=topology)
    inputs = transformer_inputs(base.config)
    assert torch.equal(evaluate(base, inputs, controlnet), evaluate(base, inputs))


@torch.no_grad()
def test_the_official_form_is_what_its_definition_says() -> None:
    base = tiny_transformer("sprint")
    controlnet = branch(base, "official")
    inputs = transformer_inputs(base.config)
    captions = base.encode_caption(inputs["text"], inputs["text_mask"])
    modulation, embedding = base.embed_time(inputs["timestep"], inputs["guidance"])
    blocks, copies = base.blocks, controlnet.blocks
    grid, bias, table = (8, 8), captions.bias, torch.unflatten(modulation, 1, (6, -1))
    projected = base.caption_norm(base.caption_projection(inputs["text"]))

    def base_block(i: int, x: Tensor) -> Tensor:
        return blocks[i](x, table, captions.keys[i], captions.values[i], bias, grid)

    x = base_block(0, base.patch_embed(inputs["latent"]))
    c = x + controlnet.input_block(base.patch_embed(control_latent(inputs)))
    for i, copy in enumerate(copies):
        c = copy(c, table, *copy.attn2.encode(projected), bias, grid)
        x = base_block(i + 1, x + controlnet.controlnet_blocks[i](c))
    expected = base.to_latent(x, embedding, grid)

    # The same operations on the same numbers.
    assert torch.equal(evaluate(base, inputs, controlnet), expected)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_folder_brings_back_the_whole_branch(topology: str, tmp_path: Path) -> None:
    base = tiny_transformer("patch2")
    controlnet = branch(base, topology)
    save_model(controlnet, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "SanaControlNetModel"
    loaded = load_model(SanaControlNetModel, tmp_path)
    assert loaded.config == controlnet.config
    inputs = transformer_inputs(base.config)
    with torch.no_grad():
        assert torch.equal(evaluate(base, inputs, loaded), evaluate(base, inputs, controlnet))
    assert ("patch_embed.proj.weight" in loaded.state_dict()) == (topology == "diffusers")


def test_a_folder_of_another_topology_is_refused(tmp_path: Path) -> None:
    save_model(branch(tiny_transformer("sprint"), "official"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "topology": "diffusers"}))
    with pytest.raises(WeightsError, match=r"missing: .*patch_embed"):
        load_model(SanaControlNetModel, tmp_path)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_gradient_reaches_the_branch_only_and_checkpointing_keeps_it(topology: str) -> None:
    base = tiny_transformer("sprint").requires_grad_(False)
    inputs = transformer_inputs(base.config)
    gradients = []
    for checkpointing in (False, True):
        controlnet = branch(base, topology)
        controlnet.gradient_checkpointing = base.gradient_checkpointing = checkpointing
        evaluate(base, inputs, controlnet).square().sum().backward()
        gradients.append({key: parameter.grad for key, parameter in controlnet.named_parameters()})
    assert all(parameter.grad is None for parameter in base.parameters())
    for key, gradient in gradients[0].items():
        assert gradient is not None, key
        assert torch.equal(gradient, gradients[1][key]), key  # recomputing repeats the same operations


def test_zero_projections_learn() -> None:
    base = tiny_transformer("sprint").requires_grad_(False)
    controlnet = SanaControlNetModel.from_transformer(base, num_layers=2)
    evaluate(base, transformer_inputs(base.config), controlnet).square().sum().backward()
    # As in every ControlNet the last projections move first, and open the way for the rest.
    assert all(layer.weight.grad.abs().max() > 0 for layer in controlnet.controlnet_blocks)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@torch.no_grad()
def test_a_bf16_pair_stays_near_the_fp32_one(topology: str) -> None:
    base = tiny_transformer("sprint")
    controlnet = branch(base, topology)
    inputs = transformer_inputs(base.config)
    exact = evaluate(base, inputs, controlnet)
    # Rounding to 8 bits in each of a few layers; measured 2e-2. An fp32 branch on a bf16 base must run too.
    for half in (controlnet, controlnet.bfloat16()):
        assert relative_error(evaluate(base.bfloat16(), inputs, half), exact) < 0.1


# --- Errors -------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    base = tiny_transformer("sprint")
    with pytest.raises(ValueError, match="topology must be one of diffusers, official; got 'pixart'"):
        SanaControlNetModel.from_transformer(base, num_layers=2, topology="pixart")
    for count in (0, 3):
        with pytest.raises(
            ValueError, match=f"{count} blocks does not fit a transformer of 3; it may have 1 to 2"
        ):
            SanaControlNetModel.from_transformer(base, num_layers=count)
    controlnet = branch(base, "official")
    inputs = transformer_inputs(base.config)
    with pytest.raises(ValueError, match=r"control_latent has shape \(2, 3, 8, 8\); expected \(batch, 4"):
        controlnet.encode_condition(base, torch.zeros(2, 3, 8, 8))
    wide = tiny_transformer("sprint", num_attention_heads=6, cross_attention_dim=48)
    with pytest.raises(ValueError, match="width is 24; the transformer's is 48"):
        controlnet.encode(wide, control_latent(inputs), inputs["text"])
    context = controlnet.encode(base, control_latent(inputs), inputs["text"])
    with pytest.raises(ValueError, match=r"tokens \(2, 64, 24\); this latent has \(2, 32, 24\)"):
        controlnet.steer(inputs["latent"][:, :, :4], inputs["timestep"], context)
