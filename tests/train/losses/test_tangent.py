"""The tangent's three ways: the dual pass against forward-mode differentiation, each of its rules against differences."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sana_sprint.backends.explicit_attention import has_fused_attention, set_fused_attention
from sana_sprint.models.transformer import CaptionContext, SanaTransformer2DModel
from sana_sprint.train.losses import forward_mode as dual
from sana_sprint.train.losses import scm as losses
from sana_sprint.train.losses import tangent
from sana_sprint.train.losses.forward_mode import Dual
from sana_sprint.trigflow import flow_denoiser
from tests.helpers.models import TRANSFORMERS, randomize, tiny_transformer, transformer_inputs

B, GRID, L = 3, (4, 6), 5


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def wrapped_inputs(model: SanaTransformer2DModel, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    """Arguments of `value_and_tangent`: masked captions, times from near data to near noise, an arbitrary direction."""
    inputs = transformer_inputs(model.config, batch=B, grid=GRID, tokens=L)
    u = inputs["latent"].to(dtype)
    t, dt = torch.tensor([[0.2, 0.9, 1.5], [0.3, -1.0, 0.5]], dtype=dtype)
    guidance = inputs["guidance"].to(dtype) if model.config.guidance_embeds else None
    context = model.encode_caption(inputs["text"].to(dtype), inputs["text_mask"])
    return model, context, u, t, torch.randn_like(u), dt, guidance


# --- The whole transformer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_dual_equals_forward_mode(name: str) -> None:
    model = tiny_transformer(name).double()
    assert_transform_equals_forward_mode(model, batch=B, grid=GRID, tokens=L)


def assert_transform_equals_forward_mode(model: SanaTransformer2DModel, **sizes: Any) -> None:
    inputs = transformer_inputs(model.config, **sizes)
    latent, time = inputs["latent"].double(), inputs["timestep"].double()
    direction = torch.randn_like(latent), torch.randn_like(time)
    guidance = inputs["guidance"].double() if model.config.guidance_embeds else None
    set_fused_attention(model.blocks, False)
    with torch.no_grad():
        context = model.encode_caption(inputs["text"].double(), inputs["text_mask"])
        expected = torch.func.jvp(lambda x, s: model(x, s, context, guidance), (latent, time), direction)
    actual = dual.transform(model, Dual(latent, direction[0]), Dual(time, direction[1]), context, guidance)
    # The same sums in another order: fp64's 1e-16, grown by cancellation.
    assert relative(actual.value, expected[0]) < 1e-10
    assert relative(actual.tangent, expected[1]) < 1e-10
    assert not actual.tangent.requires_grad


@settings(max_examples=12)
@given(
    heads=st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.integers(1, 7)),
    patch=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    batch=st.integers(1, 3),
    tokens=st.integers(4, 6),
    options=st.fixed_dictionaries(
        {
            "qk_norm": st.sampled_from([None, "rms_norm_across_heads"]),
            "guidance_embeds": st.booleans(),
            "attention_bias": st.booleans(),
            "norm_elementwise_affine": st.booleans(),
        }
    ),
)
def test_dual_equals_forward_mode_for_any_shape(
    heads: tuple[int, int, int, int],
    patch: int,
    grid: tuple[int, int],
    batch: int,
    tokens: int,
    options: dict[str, Any],
) -> None:
    num_heads, head_dim, num_cross_heads, cross_head_dim = heads
    sizes = {
        "num_attention_heads": num_heads,
        "attention_head_dim": 4 * head_dim,  # one token of width 1 would be normalised to a constant
        "num_cross_attention_heads": num_cross_heads,
        "cross_attention_head_dim": cross_head_dim,
        "cross_attention_dim": 4 * num_heads * head_dim,
        "patch_size": patch,
        "num_layers": 1,
    }
    model = tiny_transformer("plain", **sizes, **options).double()
    grid = (grid[0] * patch, grid[1] * patch)
    assert_transform_equals_forward_mode(model, batch=batch, grid=grid, tokens=tokens)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("sprint", {}), ("positions_patch2", {}), ("plain", {}), ("plain", {"timestep_scale": 0.03})],
)
def test_flow_wrapper_is_differentiated_too(name: str, changes: dict[str, Any]) -> None:
    inputs = wrapped_inputs(tiny_transformer(name, **changes).double())
    F, dF = tangent.value_and_tangent(*inputs)
    expected = tangent.value_and_tangent_by_jvp(*inputs)
    assert relative(F, expected[0]) < 1e-10  # as above
    assert relative(dF, expected[1]) < 1e-10


# --- Each rule -----------------------------------------------------------------------------------------------------


def sprint_block(**changes: Any) -> Any:
    return tiny_transformer("sprint", **changes).double().blocks[0]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def context_of_block() -> tuple[Tensor, Tensor, Tensor]:
    bias = torch.zeros(B, 1, 1, L, dtype=torch.float64)
    bias[-1, ..., 3:] = -10_000.0
    return random(B, 2, L, 12), random(B, 2, L, 12), bias


Rule = tuple[Callable[..., Any], Callable[..., Any], list[Tensor]]


def rules() -> dict[str, Callable[[], Rule]]:
    """name -> (operation, its rule, where to differentiate): rules take a Dual wherever the operation takes a tensor."""
    N, D = GRID[0] * GRID[1], 24

    def block() -> Rule:
        layer, context = sprint_block(), context_of_block()
        set_fused_attention([layer], False)
        points = [random(B, N, D), random(B, 6, D)]
        return (
            lambda x, m: layer(x, m, *context, GRID),
            lambda x, m: dual.block(layer, x, m, *context, GRID),
            points,
        )

    def self_attention() -> Rule:
        layer = sprint_block().attn1
        return layer, lambda x: dual.self_attention(layer, x), [random(B, N, D)]

    def cross_attention() -> Rule:
        layer, context = sprint_block().attn2, context_of_block()
        set_fused_attention([layer], False)
        return (
            lambda x: layer(x, *context),
            lambda x: dual.cross_attention(layer, x, *context),
            [random(B, N, D)],
        )

    def feed_forward() -> Rule:
        layer = sprint_block().ff
        return lambda x: layer(x, GRID), lambda x: dual.feed_forward(layer, x, GRID), [random(B, N, D)]

    def layer_norm() -> Rule:
        layer = nn.LayerNorm(D, eps=1e-3).double()
        randomize(layer)
        return layer, lambda x: dual.layer_norm(layer, x), [random(B, N, D)]

    def rms_norm() -> Rule:
        layer = sprint_block().attn1.norm_q
        return layer, lambda x: dual.rms_norm(layer, x), [random(B, N, D)]

    def patch_embed() -> Rule:
        layer = tiny_transformer("positions_patch2").double().patch_embed
        return layer, lambda x: dual.patch_embed(layer, x), [random(B, 4, *GRID)]

    def output() -> Rule:
        model = tiny_transformer("patch2").double()
        grid = (2, 3)

        def rule(x: Dual, embedding: Dual) -> Dual:
            return dual.output(model, x, embedding).map(lambda half: model.unpatchify(half, grid))

        return lambda x, e: model.to_latent(x, e, grid), rule, [random(B, 6, D), random(B, D)]

    def time(which: int) -> Rule:
        model, guidance = tiny_transformer("sprint").double(), torch.tensor([1.0, 3.0, 5.0]).double()
        return (
            lambda s: model.embed_time(s, guidance)[which],
            lambda s: dual.embed_time(model, s, guidance)[which],
            [torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)],
        )

    found = [block, self_attention, cross_attention, feed_forward, layer_norm, rms_norm, patch_embed, output]
    return {
        **{function.__name__: function for function in found},
        "modulation": lambda: time(0),
        "time_embedding": lambda: time(1),
    }


@pytest.mark.parametrize("name", rules())
def test_rule_equals_central_difference(name: str) -> None:
    operation, rule, points = rules()[name]()
    directions = [torch.randn_like(point) for point in points]
    h = 1e-6

    def at(distance: float) -> Tensor:
        moved = [p + distance * d for p, d in zip(points, directions, strict=True)]
        result: Tensor = operation(*moved)
        return result

    with torch.no_grad():
        expected = (at(h) - at(-h)) / (2 * h)
        actual = rule(*(Dual(p, d) for p, d in zip(points, directions, strict=True)))
        assert relative(actual.value, at(0)) < 1e-12
    # The difference errs by h^2 = 1e-12 times third derivatives, and by the fp64 rounding of values up to 10 over h, 1e-9.
    assert relative(actual.tangent, expected) < 1e-8


# --- Precision -----------------------------------------------------------------------------------------------------


def autocast_errors(name: str) -> tuple[float, float]:
    """Errors of the dual pass and of forward mode under bf16 autocast, against fp32."""
    model, *inputs = wrapped_inputs(tiny_transformer(name), torch.float32)
    exact = tangent.value_and_tangent(model, *inputs)[1]
    with torch.autocast("cpu", torch.bfloat16):
        actual = tangent.value_and_tangent(model, *inputs)[1]
        forward_mode = tangent.value_and_tangent_by_jvp(model, *inputs)[1]
    assert actual.dtype == torch.float32
    return relative(actual, exact), relative(forward_mode, exact)


# With QK norm: without it, rounding switches whole ReLU channels of so small a model, and no bound holds.
@pytest.mark.parametrize("name", ["sprint", "teacher", "patch2"])
def test_autocast_costs_no_more_precision_than_forward_mode(name: str) -> None:
    own, forward_mode = autocast_errors(name)
    # Some 30 roundings of 2^-9 one after another, adding up as squares do, are 1%; cancellation in the tangent and the
    # wrapper's 1/(cos + sin) leave it below five times that.
    assert own < 0.05
    # The same policy rounds in the same places: what differs is luck.
    assert own < 1.5 * forward_mode


def test_half_precision_weights_run_as_in_the_model() -> None:
    model, context, *inputs = wrapped_inputs(tiny_transformer("sprint"), torch.float32)
    exact = tangent.value_and_tangent(model, context, *inputs)[1]
    model = model.bfloat16()
    halved = CaptionContext(
        tuple(key.bfloat16() for key in context.keys),
        tuple(value.bfloat16() for value in context.values),
        context.bias,
    )
    actual = tangent.value_and_tangent(model, halved, *inputs)[1]
    forward_mode = tangent.value_and_tangent_by_jvp(model, halved, *inputs)[1]
    assert relative(actual, exact) < 1.5 * relative(forward_mode, exact)  # as under autocast


# --- The three kinds -----------------------------------------------------------------------------------------------


# The difference has 1e-3 of truncation and rounding here; the others round as fp32 does, 1e-7 a hundred times over.
@pytest.mark.parametrize(("kind", "tolerance"), [("dual", 1e-5), ("jvp", 1e-5), ("difference", 1e-2)])
def test_every_kind_is_the_scaled_tangent(kind: tangent.TangentKind, tolerance: float) -> None:
    model, context, u, t, teacher_F, _, guidance = wrapped_inputs(tiny_transformer("sprint"), torch.float32)
    result = tangent.make_tangent(kind)(model, context, u, t, teacher_F, guidance)
    assert all(has_fused_attention(block) for block in model.blocks)  # forward mode puts the kernels back
    set_fused_attention(model.blocks, False)
    student = flow_denoiser(lambda x, s: model(x, s, context, guidance))
    assert relative(result, losses.scaled_tangent(student, u, t, teacher_F)) < tolerance
    assert result.dtype == torch.float32
    assert not result.requires_grad


def test_difference_stays_in_fp32_under_autocast() -> None:
    model, *inputs = wrapped_inputs(tiny_transformer("sprint"), torch.float32)
    exact = tangent.value_and_tangent(model, *inputs)[1]
    with torch.autocast("cpu", torch.bfloat16):
        actual = tangent.value_and_tangent_by_difference(model, *inputs)[1]
    assert relative(actual, exact) < 1e-2  # bf16 passes would be off by 2^-9 / step, twice the tangent itself


def test_difference_is_of_second_order() -> None:
    inputs = wrapped_inputs(tiny_transformer("sprint").double())
    exact = tangent.value_and_tangent(*inputs)[1]
    errors = [
        relative(tangent.value_and_tangent_by_difference(*inputs, step=step)[1], exact)
        for step in (2e-5, 1e-5)
    ]
    # A quarter for half the step, but for the next order.
    assert errors[1] == pytest.approx(errors[0] / 4, rel=0.1)


# --- Sharded weights, and mistakes ----------------------------------------------------------------------------------


def test_mistakes_are_named() -> None:
    model, *inputs = wrapped_inputs(tiny_transformer("sprint", dropout=0.1), torch.float32)
    tangent.value_and_tangent(model, *inputs)  # dropout is harmless in evaluation mode
    with pytest.raises(ValueError, match="dropout"):
        tangent.value_and_tangent(model.train(), *inputs)
    model.eval()
    with pytest.raises(ValueError, match="guidance is missing"):
        tangent.value_and_tangent(model, *inputs[:-1])
    with pytest.raises(ValueError, match="expected \\(batch, 4, height, width\\)"):
        tangent.value_and_tangent(
            model, inputs[0], inputs[1][:, :2], inputs[2], inputs[3][:, :2], *inputs[4:]
        )
    with pytest.raises(ValueError, match="float16"):
        tangent.value_and_tangent(model.half(), *inputs)
    with pytest.raises(ValueError, match="float32 weights"):
        tangent.value_and_tangent_by_difference(model.bfloat16(), *inputs)
    with pytest.raises(ValueError, match="dual, jvp, difference; got 'newton'"):
        tangent.make_tangent("newton")  # type: ignore[arg-type]
