"""The Sana transformer on dual numbers: its output and a directional derivative together, for twice the price of one.

Each rule is named after the operation it differentiates and keeps that operation's precision; they stand in the order
of `models/transformer.py` and `models/layers.py`. Two facts keep them short. A linear map moves a tangent as it moves a
value, only without the bias. And where the Jacobian is symmetric (functions of one element, layer norm, softmax), the
tangent is what the backward pass would compute, for which torch has a fused kernel.

Axes: B batch, C latent channels, H W token grid, N = H*W image tokens, L text tokens, D width, K heads, E head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana_sprint.models.controlnet import SanaControlNetModel
from sana_sprint.models.layers import (
    LINEAR_ATTENTION_EPS,
    CrossAttention,
    GatedConvFeedForward,
    LinearSelfAttention,
    PatchEmbed,
    RMSNorm,
    autocast_off,
    merge_heads,
    product_dtype,
    split_heads,
    wide_dtype,
)
from sana_sprint.models.transformer import CaptionContext, SanaTransformer2DModel, SanaTransformerBlock
from sana_sprint.train.models.base import FlowModel
from sana_sprint.train.models.controlled import ControlledContext, ControlledTransformer

aten = torch.ops.aten


class Dual(NamedTuple):
    """A tensor and its derivative along one direction, of the same shape."""

    value: Tensor
    tangent: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Dual:
        """A linear function of both, such as a cast or a change of shape."""
        return Dual(function(self.value), function(self.tangent))

    def to(self, dtype: torch.dtype) -> Dual:
        return self.map(lambda half: half.to(dtype))

    def chunk(self, chunks: int, dim: int) -> list[Dual]:
        """As `torch.chunk`."""
        return [Dual(*pair) for pair in zip(*(half.chunk(chunks, dim) for half in self), strict=True)]


# --- The transformer ---------------------------------------------------------------------------------------------


def transform(
    model: FlowModel,
    latent: Dual,
    flow_t: Dual,
    context: CaptionContext,
    guidance: Tensor | None = None,
) -> Dual:
    """`model(latent, flow_t, context, guidance)` and its derivative along the tangents of latent and flow_t.

    Shapes and errors are those of `SanaTransformer2DModel.forward`; no gradient flows. Captions, guidance and a picture
    to follow stay fixed: their tangent is zero.

    Raises:
        ValueError: dropout is active, whose noise would differ between value and tangent; or weights are fp16, whose
            range is too small for tangents.
    """
    transformer = _transformer(model)
    _check_derivable(transformer)
    transformer.check_inputs(latent.value, flow_t.value, context, guidance)
    grid = transformer.grid(latent.value)
    with torch.no_grad():
        x = patch_embed(transformer.patch_embed, latent)
        modulation, embedding = embed_time(transformer, flow_t, guidance)
        modulation = _by_part(modulation)
        residuals: dict[int, Dual] = {}
        blocks = zip(transformer.blocks, context.keys, context.values, strict=True)
        for number, (layer, key, value) in enumerate(blocks):
            x = block(layer, x, modulation, key, value, context.bias, grid)
            if number == 0 and isinstance(model, ControlledTransformer):
                residuals = steer(model, latent, flow_t, context, guidance, x, modulation)
            if number in residuals:
                x = add(x, residuals[number])
        x = output(transformer, x, embedding)
        return x.map(lambda tokens: transformer.unpatchify(tokens, grid).to(latent.value.dtype))


def steer(
    model: ControlledTransformer,
    latent: Dual,
    flow_t: Dual,
    context: CaptionContext,
    guidance: Tensor | None,
    x: Dual,
    modulation: Dual,
) -> dict[int, Dual]:
    """The branch's residuals after each block; x (B,N,D) and modulation (B,6,D) are the transformer's after block 0."""
    assert isinstance(context, ControlledContext)
    branch, control, captions = model.controlnet, context.control, context.control.captions
    is_official = branch.config.topology == "official"
    if not is_official:
        x = patch_embed(branch.patch_embed, latent)
        own_guidance = guidance if branch.config.guidance_embeds else None
        modulation = _by_part(embed_time(branch, flow_t.map(model.own_time), own_guidance)[0])
    x = Dual(x.value + control.condition.to(x.value.dtype), x.tangent)
    grid = model.transformer.grid(latent.value)
    residuals = {}
    copies = zip(branch.blocks, captions.keys, captions.values, branch.controlnet_blocks, strict=True)
    for number, (layer, key, value, projection) in enumerate(copies):
        assert isinstance(projection, nn.Linear)
        x = block(layer, x, modulation, key, value, captions.bias, grid)
        low = x.to(product_dtype(projection.weight))
        residuals[number + (not is_official)] = linear(low, projection.weight, projection.bias)
    return residuals


def _by_part(modulation: Dual) -> Dual:
    """(B,6D) -> (B,6,D)."""
    return modulation.map(lambda half: torch.unflatten(half, 1, (6, -1)))


def block(
    layer: SanaTransformerBlock,
    x: Dual,
    modulation: Dual,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    grid: tuple[int, int],
) -> Dual:
    table = Dual(layer.scale_shift_table + modulation.value, modulation.tangent)
    shift1, scale1, gate1, shift2, scale2, gate2 = table.chunk(6, dim=1)
    low = product_dtype(layer.attn1.to_q.weight)

    normed = modulate(layer_norm(layer.norm1, x), shift1, scale1)
    x = addcmul(x, gate1, self_attention(layer.attn1, normed.to(low)))
    x = add(x, cross_attention(layer.attn2, x.to(low), key, value, bias))
    normed = modulate(layer_norm(layer.norm2, x), shift2, scale2)
    return addcmul(x, gate2, feed_forward(layer.ff, normed.to(low), grid))


def output(transformer: SanaTransformer2DModel, x: Dual, embedding: Dual) -> Dual:
    """Tokens (B,N,D) -> (B,N,p*p*out_channels)."""
    embedding = embedding.map(lambda e: e[:, None])
    table = Dual(transformer.scale_shift_table + embedding.value, embedding.tangent.expand(-1, 2, -1))
    shift, scale = table.chunk(2, dim=1)
    with autocast_off(x.value.device):
        x = modulate(layer_norm(transformer.norm_out, x), shift, scale)
        return linear(x.to(transformer.dtype), transformer.proj_out.weight, transformer.proj_out.bias)


# --- Embeddings --------------------------------------------------------------------------------------------------


def patch_embed(layer: PatchEmbed, latent: Dual) -> Dual:
    """Positions and bias are constants, so the tangent is the convolution alone."""
    weight, patch = layer.proj.weight, layer.patch_size
    with autocast_off(weight.device):
        tangent = F.conv2d(latent.tangent.to(weight.dtype), weight, stride=patch)
    # Contiguous, because every later tangent would inherit the layout.
    return Dual(layer(latent.value), tangent.flatten(2).transpose(1, 2).contiguous())


def embed_time(
    transformer: SanaTransformer2DModel | SanaControlNetModel, flow_t: Dual, guidance: Tensor | None
) -> tuple[Dual, Dual]:
    """Modulation (B,6D) and embedding (B,D). B rows only, so automatic differentiation costs nothing here."""

    def embed(time: Tensor) -> tuple[Tensor, Tensor]:
        return transformer.embed_time(time, guidance)

    values, tangents = torch.func.jvp(embed, (flow_t.value,), (flow_t.tangent,))[:2]
    return Dual(values[0], tangents[0]), Dual(values[1], tangents[1])


# --- Attention ---------------------------------------------------------------------------------------------------


def self_attention(layer: LinearSelfAttention, x: Dual) -> Dual:
    q, k, v = (linear(x, to.weight, to.bias) for to in (layer.to_q, layer.to_k, layer.to_v))
    q, k = rms_norm(layer.norm_q, q), rms_norm(layer.norm_k, k)
    return project_out(layer, linear_attention(q, k, v, layer.num_heads))


def cross_attention(layer: CrossAttention, x: Dual, key: Tensor, value: Tensor, bias: Tensor | None) -> Dual:
    """In fp32, whatever the layer's class: fused kernels keep no probabilities, which the tangent is made of."""
    q = rms_norm(layer.norm_q, linear(x, layer.to_q.weight, layer.to_q.bias))
    q = q.map(lambda half: split_heads(half, layer.num_heads))
    return project_out(layer, softmax_attention(q, key, value, bias).map(merge_heads))


def linear_attention(q: Dual, k: Dual, v: Dual, num_heads: int) -> Dual:
    wide = wide_dtype(v.value)

    def to_heads(x: Tensor) -> Tensor:
        # Heads join the batch: products of three axes add up in place (`matmul`).
        return split_heads(x, num_heads).to(wide, memory_format=torch.contiguous_format).flatten(0, 1)

    def from_heads(x: Tensor) -> Tensor:
        return merge_heads(torch.unflatten(x, 0, (-1, num_heads)))

    q, k, v = relu(q).map(to_heads), relu(k).map(to_heads), v.map(to_heads)  # (B*K,N,E)
    with autocast_off(v.value.device):
        k = k.map(lambda half: half.transpose(1, 2))  # (B*K,E,N)
        numerator = matmul(q, matmul(k, v))  # (B*K,N,E)
        denominator = matmul(q, k.map(lambda half: half.sum(dim=2, keepdim=True)))  # (B*K,N,1)
    denominator = denominator._replace(value=denominator.value + LINEAR_ATTENTION_EPS)
    return divide(numerator, denominator).map(from_heads)


def softmax_attention(q: Dual, key: Tensor, value: Tensor, bias: Tensor | None) -> Dual:
    """Keys and values (B,K,L,E) come from the caption and have no tangent."""
    wide = wide_dtype(q.value)
    with autocast_off(q.value.device):
        key = key.to(wide).transpose(-1, -2)
        scores = q.map(lambda half: (half.to(wide) * half.shape[-1] ** -0.5) @ key)  # (B,K,N,L)
        if bias is not None:
            scores = scores._replace(value=scores.value + bias.to(wide))
        return softmax(scores).map(lambda half: half @ value.to(wide))


def project_out(layer: LinearSelfAttention | CrossAttention, x: Dual) -> Dual:
    out = layer.to_out[0]
    assert isinstance(out, nn.Linear)
    return linear(x.to(product_dtype(out.weight)), out.weight, out.bias)


# --- Feed-forward ------------------------------------------------------------------------------------------------


def feed_forward(layer: GatedConvFeedForward, x: Dual, grid: tuple[int, int]) -> Dual:
    hidden = silu(linear(x, layer.conv_inverted.weight.flatten(1), layer.conv_inverted.bias))
    image = hidden.map(lambda half: torch.unflatten(half, 1, grid).permute(0, 3, 1, 2))
    image = depthwise(layer.conv_depth, image)
    value, gate = image.map(lambda half: half.permute(0, 2, 3, 1).flatten(1, 2)).chunk(2, dim=-1)
    return linear(multiply(value, silu(gate)), layer.conv_point.weight.flatten(1), None)


def depthwise(layer: nn.Conv2d, image: Dual) -> Dual:
    weight = layer.weight.to(product_dtype(layer.weight))
    return Dual(
        layer(image.value), F.conv2d(image.tangent, weight, padding=layer.padding, groups=layer.groups)
    )


# --- Arithmetic --------------------------------------------------------------------------------------------------


def linear(x: Dual, weight: Tensor, bias: Tensor | None) -> Dual:
    """Two products rather than one of twice the size, which would need a copy to stack and a pass to add the bias."""
    weight = weight.to(product_dtype(weight))
    bias = None if bias is None else bias.to(weight.dtype)
    return Dual(F.linear(x.value, weight, bias), F.linear(x.tangent, weight))


def matmul(a: Dual, b: Dual) -> Dual:
    """Of three axes each."""
    return Dual(a.value @ b.value, torch.baddbmm(a.tangent @ b.value, a.value, b.tangent))


def add(a: Dual, b: Dual) -> Dual:
    return Dual(a.value + b.value, a.tangent + b.tangent)


def multiply(a: Dual, b: Dual) -> Dual:
    return Dual(a.value * b.value, (a.value * b.tangent).addcmul_(a.tangent, b.value))


def addcmul(x: Dual, a: Dual, b: Dual) -> Dual:
    """x + a*b; a and b broadcast."""
    tangent = torch.addcmul(x.tangent, a.value, b.tangent)
    return Dual(torch.addcmul(x.value, a.value, b.value), tangent.addcmul_(a.tangent, b.value))


def modulate(x: Dual, shift: Dual, scale: Dual) -> Dual:
    """`x * (1 + scale) + shift`."""
    return addcmul(shift, x, scale._replace(value=1 + scale.value))


def divide(a: Dual, b: Dual) -> Dual:
    """b has one column for all of a's."""
    quotient = a.value / b.value
    return Dual(quotient, torch.addcmul(a.tangent, quotient, b.tangent, value=-1) / b.value)


def relu(x: Dual) -> Dual:
    return Dual(F.relu(x.value), aten.threshold_backward(x.tangent, x.value, 0))


def silu(x: Dual) -> Dual:
    return Dual(F.silu(x.value), aten.silu_backward(x.tangent, x.value))


def softmax(x: Dual) -> Dual:
    """Over the last axis."""
    value = torch.softmax(x.value, dim=-1)
    return Dual(value, aten._softmax_backward_data(x.tangent, value, -1, value.dtype))


def layer_norm(layer: nn.LayerNorm, x: Dual) -> Dual:
    value, mean, rstd = torch.native_layer_norm(
        x.value, layer.normalized_shape, layer.weight, layer.bias, layer.eps
    )
    tangent = aten.native_layer_norm_backward(
        x.tangent, x.value, layer.normalized_shape, mean, rstd, None, None, (True, False, False)
    )[0]
    return Dual(value, tangent if layer.weight is None else tangent * layer.weight)


def rms_norm(layer: nn.Module, x: Dual) -> Dual:
    """With n = x/rms(x), the tangent is (x' - n mean(n x')) / rms(x). The Identity of a model without QK norm passes."""
    if not isinstance(layer, RMSNorm):
        return x
    wide = wide_dtype(x.value)
    value, tangent = x.map(lambda half: half.to(wide))
    scale = torch.rsqrt(value.square().mean(-1, keepdim=True) + layer.eps)
    normed = value * scale
    along = (normed * tangent).mean(-1, keepdim=True)
    tangent = torch.addcmul(tangent, normed, along, value=-1).mul_(scale)
    return Dual(normed, tangent).map(lambda half: (half * layer.weight).to(layer.weight.dtype))


# --- Sharded weights ---------------------------------------------------------------------------------------------


def _transformer(model: FlowModel) -> SanaTransformer2DModel:
    transformer = model.transformer if isinstance(model, ControlledTransformer) else model
    assert isinstance(transformer, SanaTransformer2DModel)
    return transformer


def _check_derivable(transformer: SanaTransformer2DModel) -> None:
    config = transformer.config
    if transformer.training and config.dropout > 0:
        raise ValueError(
            f"the tangent needs dropout inactive; it is {config.dropout} and the model is in training mode (call eval)"
        )
    if product_dtype(transformer.proj_out.weight) == torch.float16:
        raise ValueError("the tangent does not fit float16's range; use bfloat16 or float32")
