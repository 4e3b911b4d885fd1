"""The transformer against the published implementation, on the same random weights."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from sana_sprint.backends.explicit_attention import set_fused_attention
from sana_sprint.models.transformer import SanaTransformer2DModel, TransformerConfig
from tests.helpers.models import PUBLISHED_TRANSFORMERS, TRANSFORMERS, randomize, transformer_inputs

# Both sides round fp32 in different orders, measured at 2e-6 of the output's rms; other machines' kernels may
# differ by more. A swapped shift and scale, a missing norm or bias moves the output by 1e-2 and more.
FP32_TOLERANCE = 1e-4


def pair(values: dict[str, Any]) -> tuple[diffusers.SanaTransformer2DModel, SanaTransformer2DModel]:
    reference = diffusers.SanaTransformer2DModel(**values).eval()
    randomize(reference)
    ours = SanaTransformer2DModel(TransformerConfig(**values)).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    return reference, ours


def run_reference(
    model: diffusers.SanaTransformer2DModel, inputs: dict[str, Tensor], *, masked: bool
) -> Tensor:
    guidance = None
    if model.config.guidance_embeds:  # the published model leaves this factor to its caller
        guidance = inputs["guidance"] * model.config.guidance_embeds_scale
    output: Tensor = model(
        inputs["latent"],
        encoder_hidden_states=inputs["text"],
        timestep=inputs["timestep"],
        guidance=guidance,
        encoder_attention_mask=inputs["text_mask"] if masked else None,
        return_dict=False,
    )[0]
    return output


def run_ours(model: SanaTransformer2DModel, inputs: dict[str, Tensor], *, masked: bool) -> Tensor:
    context = model.encode_caption(inputs["text"], inputs["text_mask"] if masked else None)
    guidance = inputs["guidance"] if model.config.guidance_embeds else None
    output: Tensor = model(inputs["latent"], inputs["timestep"], context, guidance)
    return output


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Largest difference over the root mean square of the reference."""
    value, reference = value.double(), reference.double()
    return float((value - reference).abs().max() / reference.square().mean().sqrt())


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "explicit"])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize("grid", [(8, 8), (6, 10), (12, 2)], ids=str)
@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.no_grad()
def test_outputs_equal(name: str, grid: tuple[int, int], masked: bool, fused: bool) -> None:
    reference, ours = pair(TRANSFORMERS[name])
    set_fused_attention(ours.blocks, fused)
    inputs = transformer_inputs(ours.config, batch=3, grid=grid)
    expected = run_reference(reference, inputs, masked=masked)
    actual = run_ours(ours, inputs, masked=masked)
    assert actual.shape == expected.shape
    assert relative_error(actual, expected) < FP32_TOLERANCE


@torch.no_grad()
def test_outputs_equal_where_every_epsilon_counts() -> None:
    reference, ours = pair(TRANSFORMERS["sprint"])
    # Every norm's input about as small as the square root of its epsilon.
    small = ("patch_embed", "caption_projection.linear_2", "to_q", "to_k", "to_out", "conv_point")
    for model in (reference, ours):
        for key, parameter in model.named_parameters():
            if any(part in key for part in small):
                parameter.mul_(1e-3)
    inputs = transformer_inputs(ours.config)
    expected = run_reference(reference, inputs, masked=True)
    assert relative_error(run_ours(ours, inputs, masked=True), expected) < FP32_TOLERANCE


@torch.no_grad()
def test_outputs_equal_at_thousandfold_times() -> None:
    reference, ours = pair(TRANSFORMERS["plain"])
    inputs = transformer_inputs(ours.config)
    inputs["timestep"] = torch.tensor([999, 3])  # plain SANA counts in thousandths, as integers
    expected = run_reference(reference, inputs, masked=True)
    assert relative_error(run_ours(ours, inputs, masked=True), expected) < FP32_TOLERANCE


@pytest.mark.parametrize("name", ["sprint", "positions_patch2", "biases_and_affine"])
def test_gradients_equal(name: str) -> None:
    reference, ours = pair(TRANSFORMERS[name])
    inputs = transformer_inputs(ours.config, grid=(6, 4))
    target = torch.randn(2, 4, 6, 4, generator=torch.Generator().manual_seed(2))
    (run_reference(reference, inputs, masked=True) * target).sum().backward()
    (run_ours(ours, inputs, masked=True) * target).sum().backward()
    expected = dict(reference.named_parameters())
    for key, parameter in ours.named_parameters():
        grad, reference_grad = parameter.grad, expected[key].grad
        assert grad is not None, key
        if key.endswith("attn2.to_k.bias") and ours.config.qk_norm is None:
            # Softmax ignores a shift common to all keys, so this gradient is zero and only rounding is left.
            torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-3)
            continue
        # One order looser than outputs: each gradient sums products of two rounded numbers over all tokens.
        assert relative_error(grad, reference_grad) < 1e-3, key


@pytest.mark.parametrize("name", ["sprint", "plain"])
@torch.no_grad()
def test_bf16_is_no_worse_than_the_reference(name: str) -> None:
    reference, ours = pair(TRANSFORMERS[name])
    inputs = transformer_inputs(ours.config, batch=8)
    exact = run_reference(reference, inputs, masked=True)

    low = {key: value.bfloat16() if key in ("latent", "text") else value for key, value in inputs.items()}
    reference_error = (run_reference(reference.bfloat16(), low, masked=True) - exact).square().mean().sqrt()
    our_error = (run_ours(ours.bfloat16(), low, masked=True) - exact).square().mean().sqrt()
    assert (
        our_error < 1.2 * reference_error
    )  # both are rounding noise of the same size; 1.2 leaves room for luck


@pytest.mark.parametrize("name", [*TRANSFORMERS, *PUBLISHED_TRANSFORMERS])
def test_keys_and_shapes_equal(name: str) -> None:
    values = TRANSFORMERS[name] if name in TRANSFORMERS else PUBLISHED_TRANSFORMERS[name][0]
    with torch.device("meta"):
        reference = diffusers.SanaTransformer2DModel(**values)
        ours = SanaTransformer2DModel(TransformerConfig(**values))
    expected = {key: tuple(value.shape) for key, value in reference.state_dict().items()}
    assert {key: tuple(value.shape) for key, value in ours.state_dict().items()} == expected


def test_config_has_the_published_fields_and_defaults() -> None:
    parameters = inspect.signature(diffusers.SanaTransformer2DModel.__init__).parameters
    expected = {name: parameter.default for name, parameter in parameters.items() if name != "self"}
    assert {field.name: field.default for field in fields(TransformerConfig)} == expected


def test_published_config_json_is_read(tmp_path: Path) -> None:
    diffusers.SanaTransformer2DModel(**TRANSFORMERS["patch2"]).save_config(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["_class_name"] == SanaTransformer2DModel.published_class_name
    assert TransformerConfig.from_dict(values) == TransformerConfig(**TRANSFORMERS["patch2"])
