"""The transformer by itself: caption contexts, precision, derivatives, errors, sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sana_sprint import backends
from sana_sprint.backends.explicit_attention import set_fused_attention
from sana_sprint.models.layers import grid_positions, linear_attention, sinusoid
from sana_sprint.models.transformer import CaptionContext, SanaTransformer2DModel, TransformerConfig
from tests.helpers.models import PUBLISHED_TRANSFORMERS, TRANSFORMERS, tiny_transformer, transformer_inputs

# Two ways to sum the same fp32 numbers; measured below 3e-6 on outputs of about unit size.
SAME_UP_TO_ROUNDING = {"rtol": 1e-4, "atol": 2e-5}


def evaluate(model: SanaTransformer2DModel, inputs: dict[str, Tensor]) -> Tensor:
    context = model.encode_caption(inputs["text"], inputs["text_mask"])
    guidance = inputs["guidance"] if model.config.guidance_embeds else None
    output: Tensor = model(inputs["latent"], inputs["timestep"], context, guidance)
    return output


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


# --- Config ------------------------------------------------------------------------------------------------------


def test_config_round_trip() -> None:
    config = TransformerConfig(**TRANSFORMERS["odd_sizes"])
    assert TransformerConfig.from_dict(config.to_dict()) == config


def test_config_drops_notes_and_lists_unknown_fields() -> None:
    assert TransformerConfig.from_dict({"_diffusers_version": "0.42.1"}) == TransformerConfig()
    with pytest.raises(ValueError, match="num_lairs, zeal"):
        TransformerConfig.from_dict({"zeal": 1, "num_layers": 2, "num_lairs": 2})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": "layer_norm"}, "rms_norm_across_heads; got 'layer_norm'"),
        ({"cross_attention_dim": 32}, "cross_attention_dim is 32.*24"),
        ({"interpolation_scale": 1.0, "num_attention_heads": 1, "attention_head_dim": 6, "cross_attention_dim": 6}, "multiple of 4"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_cross_attention_heads": None}, "num_cross_attention_heads is None"),
    ],
)  # fmt: skip
def test_config_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**{**TRANSFORMERS["plain"], **changes})


@pytest.mark.parametrize("name", PUBLISHED_TRANSFORMERS)
def test_parameter_counts(name: str) -> None:
    values, count = PUBLISHED_TRANSFORMERS[name]
    with torch.device("meta"):
        model = SanaTransformer2DModel(TransformerConfig(**values))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


# --- Captions ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_context_serves_all_steps_and_any_arrangement_of_its_captions() -> None:
    model = tiny_transformer()
    inputs = transformer_inputs(model.config, batch=3)
    context = model.encode_caption(inputs["text"], inputs["text_mask"])
    rows = torch.tensor([2, 0, 0, 1])
    for timestep in (0.9, 0.4):  # the second use must not find anything changed by the first
        times = torch.full((4,), timestep)
        cached = model(inputs["latent"][rows], times, context.index(rows), inputs["guidance"][rows])
        fresh_context = model.encode_caption(inputs["text"][rows], inputs["text_mask"][rows])
        fresh = model(inputs["latent"][rows], times, fresh_context, inputs["guidance"][rows])
        torch.testing.assert_close(cached, fresh, **SAME_UP_TO_ROUNDING)


@torch.no_grad()
def test_repeat_keeps_the_copies_of_a_caption_together() -> None:
    model = tiny_transformer()
    inputs = transformer_inputs(model.config, batch=2)
    context = model.encode_caption(inputs["text"], inputs["text_mask"]).repeat(3)
    assert context.batch_size == 6
    assert context.bias is not None
    assert (context.bias[:, 0, 0, -1] < 0).tolist() == [False, False, False, True, True, True]
    for row, source in enumerate([0, 0, 0, 1, 1, 1]):
        assert torch.equal(context.keys[1][row], context.keys[1][source * 3])


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "explicit"])
@torch.no_grad()
def test_dropping_masked_tokens_equals_masking_them(fused: bool) -> None:
    model = tiny_transformer()
    set_fused_attention(model.blocks, fused)
    inputs = transformer_inputs(model.config, batch=1)  # its caption keeps 3 of 7 tokens
    dropped = {**inputs, "text": inputs["text"][:, :3], "text_mask": inputs["text_mask"][:, :3]}
    torch.testing.assert_close(evaluate(model, dropped), evaluate(model, inputs), **SAME_UP_TO_ROUNDING)
    kept = {**inputs, "text_mask": torch.ones(1, 7, dtype=torch.bool)}
    assert (evaluate(model, kept) - evaluate(model, inputs)).abs().max() > 0.01  # the other tokens do matter


@torch.no_grad()
def test_a_mask_that_keeps_everything_costs_nothing() -> None:
    model = tiny_transformer()
    text = transformer_inputs(model.config)["text"]
    assert model.encode_caption(text).bias is None
    assert model.encode_caption(text, torch.ones(2, 7, dtype=torch.bool)).bias is None
    assert model.encode_caption(text, torch.ones(2, 7, dtype=torch.int64)).bias is None


@torch.no_grad()
def test_explicit_attention_equals_fused() -> None:
    model = tiny_transformer()
    inputs = transformer_inputs(model.config)
    fused = evaluate(model, inputs)
    set_fused_attention(model.blocks, False)
    torch.testing.assert_close(evaluate(model, inputs), fused, **SAME_UP_TO_ROUNDING)


# --- Guidance and time -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_each_image_has_its_own_guidance() -> None:
    model = tiny_transformer()
    inputs = transformer_inputs(model.config, batch=2)
    inputs = {key: value[:1].repeat(2, *[1] * (value.ndim - 1)) for key, value in inputs.items()}
    inputs["guidance"] = torch.tensor([1.0, 5.0])
    both = evaluate(model, inputs)
    assert (both[0] - both[1]).abs().max() > 0.01
    for row in range(2):
        alone = evaluate(model, {key: value[row : row + 1] for key, value in inputs.items()})
        torch.testing.assert_close(alone, both[row : row + 1], **SAME_UP_TO_ROUNDING)


@torch.no_grad()
def test_guidance_and_time_reach_the_sinusoid_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(value: Tensor) -> Tensor:
        seen.append(value)
        return sinusoid(value)

    monkeypatch.setattr("sana_sprint.models.layers.sinusoid", spy)
    tiny_transformer().bfloat16().embed_time(torch.tensor([0.7827]), torch.tensor([4.5]))
    assert [value.dtype for value in seen] == [torch.float32] * 2
    # In bf16 these would be 0.78125 and 0.44922. 0.1 itself is rounded once to fp32, hence not exactly equal.
    torch.testing.assert_close(torch.cat(seen), torch.tensor([0.7827, 0.45]), rtol=1e-7, atol=0)


def test_sinusoid_is_cosines_then_sines() -> None:
    value = torch.tensor([0.0, 0.5, 1.0])
    wave = sinusoid(value)
    assert wave.shape == (3, 256)
    for k in (0, 1, 64, 127):
        angle = value * 10_000.0 ** (-k / 128)
        # One rounding in the exponent and one in the angle.
        torch.testing.assert_close(wave[:, k], angle.cos(), rtol=0, atol=1e-6)
        torch.testing.assert_close(wave[:, 128 + k], angle.sin(), rtol=0, atol=1e-6)


def test_positions_of_any_grid_span_the_same_coordinates() -> None:
    small = grid_positions(4, 6, 16, 8, 2.0, torch.device("cpu")).view(4, 6, 16)
    large = grid_positions(8, 12, 16, 8, 2.0, torch.device("cpu")).view(8, 12, 16)
    torch.testing.assert_close(
        large[::2, ::2], small, rtol=0, atol=1e-6
    )  # fp32 rounding of positions below 4
    column = torch.arange(6) / 6 * 8 / 2  # frequency 0 is 1, columns come first
    torch.testing.assert_close(small[1, :, 0], column.sin(), rtol=0, atol=1e-6)


# --- Precision ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_linear_attention_without_any_positive_query_is_zero() -> None:
    ones = torch.ones(1, 4, 8)
    assert torch.equal(linear_attention(-ones, ones, ones, 2), torch.zeros(1, 4, 8))


@torch.no_grad()
def test_linear_attention_sums_half_precision_inputs_in_fp32() -> None:
    # 4096 keys of 1 and values of 1 + 2^-7: a bf16 sum would stop growing at 256 or lose the 2^-7.
    q = torch.ones(1, 4096, 4, dtype=torch.bfloat16)
    v = torch.full_like(q, 1 + 2**-7)
    assert torch.equal(linear_attention(q, q, v, 1), v.float())


@torch.no_grad()
def test_linear_attention_is_the_same_under_autocast() -> None:
    q, k, v = torch.randn(3, 2, 16, 8).unbind()
    expected = linear_attention(q, k, v, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_attention(q, k, v, 2), expected)


@pytest.mark.parametrize("name", ["sprint", "plain", "positions_patch2"])
@torch.no_grad()
def test_bf16_is_finite_and_near_fp32(name: str) -> None:
    model = tiny_transformer(name)
    inputs = transformer_inputs(model.config, batch=4)
    exact = evaluate(model, inputs)
    output = evaluate(model.bfloat16(), inputs)
    assert output.dtype == torch.float32  # the latent's dtype, so that a sampler's fp32 state stays fp32
    # bf16 keeps 8 bits (2^-9 per rounding); a dozen roundings in each of 3 blocks add up to about 1%, measured 1.5%.
    assert rms(output - exact) < 0.05 * rms(exact)


@torch.no_grad()
def test_autocast_is_near_fp32_and_keeps_time_exact() -> None:
    model = tiny_transformer()
    inputs = transformer_inputs(model.config, batch=4)
    exact, exact_time = evaluate(model, inputs), model.embed_time(inputs["timestep"], inputs["guidance"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, time = evaluate(model, inputs), model.embed_time(inputs["timestep"], inputs["guidance"])
    assert all(torch.equal(a, b) for a, b in zip(time, exact_time, strict=True))
    assert output.dtype == torch.float32
    error = rms(output - exact) / rms(exact)
    assert error < 0.05  # as above
    assert error > 1e-4  # the products did run in bf16


@torch.no_grad()
def test_fp16_overflow_in_self_attention_is_clamped() -> None:
    attention = tiny_transformer().half().blocks[0].attn1
    attention.to_out[0].weight.fill_(6e4)
    x = torch.randn(1, 8, 24).half()
    assert not attention.to_out[0](torch.ones(1, 24).half()).isfinite().all()
    assert attention(x).abs().max() == 65504


@torch.no_grad()
@pytest.mark.parametrize("put_on", [lambda model: model, backends.apply], ids=["plain", "default"])
def test_feed_forward_reads_tokens_as_channels_last(put_on: Callable[[Any], Any]) -> None:
    feed_forward = put_on(tiny_transformer()).blocks[0].ff
    images: list[Tensor] = []

    def look(_module: torch.nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        images.extend((args[0], output))

    feed_forward.conv_depth.register_forward_hook(look)
    feed_forward(torch.randn(2, 48, 24), (6, 8))
    assert len(images) == 2
    assert all(image.is_contiguous(memory_format=torch.channels_last) for image in images)


# --- Derivatives -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sprint", "plain"])
def test_jvp_equals_central_differences(name: str) -> None:
    model = tiny_transformer(name).double()
    set_fused_attention(model.blocks, False)
    inputs = {
        k: v.double() if v.is_floating_point() else v for k, v in transformer_inputs(model.config).items()
    }
    x, t = inputs["latent"], inputs["timestep"]
    generator = torch.Generator().manual_seed(3)
    dx = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    dt = torch.randn(t.shape, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        context = model.encode_caption(inputs["text"], inputs["text_mask"])
        guidance = inputs["guidance"] if model.config.guidance_embeds else None

        def network(x: Tensor, t: Tensor) -> Tensor:
            output: Tensor = model(x, t, context, guidance)
            return output

        primal, tangent = torch.func.jvp(network, (x, t), (dx, dt))
        h = 1e-6
        difference = (network(x + h * dx, t + h * dt) - network(x - h * dx, t - h * dt)) / (2 * h)
        assert torch.equal(primal, network(x, t))
    # Truncation h^2 = 1e-12 and cancellation 1e-16 / h = 1e-10 of the function's size; the angles are fp64 too.
    # ReLU kinks within h of an input would show, but none of these few thousand lies so near.
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-7)


def gradients(model: SanaTransformer2DModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    evaluate(model, inputs).square().sum().backward()
    return {
        key: parameter.grad.clone()
        for key, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_gradient_checkpointing_changes_no_gradient(autocast: bool) -> None:
    model = tiny_transformer().train()
    inputs = transformer_inputs(model.config)
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    model.blocks[1].ff.conv_depth.register_forward_pre_hook(count)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        plain = gradients(model, inputs)
        model.gradient_checkpointing = True
        recomputed = gradients(model, inputs)
    assert runs == 3  # once plain, twice with recomputation
    assert plain.keys() == dict(model.named_parameters()).keys()
    # Bitwise: the recomputation is the same program on the same numbers.
    assert all(torch.equal(plain[key], recomputed[key]) for key in plain)


def test_dropout_acts_in_training_only() -> None:
    model = tiny_transformer("sprint", dropout=0.5)
    inputs = transformer_inputs(model.config)
    with torch.no_grad():
        assert torch.equal(evaluate(model, inputs), evaluate(model, inputs))
        assert torch.equal(evaluate(model, inputs), evaluate(tiny_transformer("sprint"), inputs))
        model.train()
        assert not torch.equal(evaluate(model, inputs), evaluate(model, inputs))


# --- Errors ------------------------------------------------------------------------------------------------------


def call(model: SanaTransformer2DModel, **changes: Any) -> Tensor:
    inputs: dict[str, Any] = transformer_inputs(model.config)
    context: CaptionContext = model.encode_caption(inputs["text"], inputs["text_mask"])
    arguments = {
        "latent": inputs["latent"],
        "timestep": inputs["timestep"],
        "context": context,
        "guidance": None,
    }
    if model.config.guidance_embeds:
        arguments["guidance"] = inputs["guidance"]
    arguments |= changes
    output: Tensor = model(
        arguments["latent"], arguments["timestep"], arguments["context"], arguments["guidance"]
    )
    return output


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("sprint", {"guidance": None}, "guidance is missing"),
        ("teacher", {"guidance": torch.ones(2)}, "no guidance embedding"),
        ("sprint", {"guidance": torch.ones(1)}, r"guidance has shape \(1,\); expected \(2,\)"),
        ("sprint", {"timestep": torch.tensor(0.5)}, r"timestep has shape \(\); expected \(2,\)"),
        ("sprint", {"latent": torch.zeros(2, 5, 8, 8)}, r"\(2, 5, 8, 8\); expected \(batch, 4"),
        ("sprint", {"latent": torch.zeros(4, 8, 8)}, r"\(4, 8, 8\); expected \(batch, 4"),
        ("patch2", {"latent": torch.zeros(2, 4, 8, 7)}, "8 x 7; both must be multiples of patch_size 2"),
        ("sprint", {"latent": torch.zeros(1, 4, 8, 8), "timestep": torch.ones(1), "guidance": torch.ones(1)}, "2 captions for 1 images"),
    ],
)  # fmt: skip
def test_wrong_inputs_are_refused(name: str, changes: dict[str, Any], message: str) -> None:
    model = tiny_transformer(name)
    assert call(model).shape == (2, 4, 8, 8)
    with pytest.raises(ValueError, match=message):
        call(model, **changes)


def test_wrong_captions_are_refused() -> None:
    model = tiny_transformer()
    with pytest.raises(ValueError, match=r"text has shape \(2, 7, 9\); expected \(batch, tokens, 10\)"):
        model.encode_caption(torch.zeros(2, 7, 9))
    with pytest.raises(ValueError, match=r"text_mask has shape \(2, 6\); expected \(2, 7\)"):
        model.encode_caption(torch.zeros(2, 7, 10), torch.ones(2, 6, dtype=torch.bool))


def test_a_context_of_another_model_is_refused() -> None:
    model, other = tiny_transformer(), tiny_transformer(num_layers=2)
    inputs = transformer_inputs(model.config)
    with pytest.raises(ValueError, match=r"2 blocks.*has 3"):
        call(model, context=other.encode_caption(inputs["text"]))


def test_tiny_models_differ() -> None:
    """The random weights of the helpers must not make every model the same constant."""
    outputs = []
    for name in ("sprint", "teacher"):
        model = tiny_transformer(name)
        with torch.no_grad():
            outputs.append(evaluate(model, transformer_inputs(model.config)))
    assert all(0.1 < rms(output) < 100 for output in outputs)
    assert all(rms(a - b) > 0.01 for a, b in itertools.combinations(outputs, 2))
