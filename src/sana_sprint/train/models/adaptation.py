"""Gives a flow-matching teacher what consistency distillation needs: dense time and QK norm (SANA-Sprint, section 3.2).

Both change what the model computes, so a fine-tuning has to follow. It is short because the start is close: the new
time embedding imitates the old one, and the new norms keep the size that queries and keys had.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from sana_sprint.models.layers import (
    SINUSOID_CHANNELS,
    CrossAttention,
    LinearSelfAttention,
    ScalarEmbedder,
    sinusoid,
)
from sana_sprint.models.transformer import QK_NORMS, SanaTransformer2DModel

_FIT_POINTS = 1024  # times at which the new time embedding is fitted
_STEEPNESS = 10.0  # of the thresholds, in 1/time: how fine a dependence on time is kept
_RIDGE = 1e-4


def with_qk_norm(
    teacher: SanaTransformer2DModel, evaluate: Callable[[SanaTransformer2DModel], object]
) -> SanaTransformer2DModel:
    """A copy of the teacher whose queries and keys are normalised to the root mean square that they have now.

    A model that has QK norm already is copied as it is.

    Args:
        teacher: any Sana transformer.
        evaluate: runs the model it is given on typical inputs, captions included, in order to measure it.
    """
    qk_norm = QK_NORMS[-1]
    model = SanaTransformer2DModel(replace(teacher.config, qk_norm=qk_norm)).to(teacher.device)
    model.load_state_dict(teacher.state_dict(), strict=teacher.config.qk_norm == qk_norm)
    if teacher.config.qk_norm == qk_norm:
        return model
    sizes = _query_and_key_sizes(teacher, evaluate)
    for name, size in sizes.items():
        nn.init.constant_(model.get_parameter(name), size)
    return model


@torch.no_grad()
def _query_and_key_sizes(
    model: SanaTransformer2DModel, evaluate: Callable[[SanaTransformer2DModel], object]
) -> dict[str, float]:
    """The root mean square of every layer's queries and keys, by the name of the norm weight that shall hold it."""
    squares: dict[str, list[Tensor]] = {}
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, LinearSelfAttention | CrossAttention):
            for part in ("q", "k"):
                seen = squares.setdefault(f"{path}.norm_{part}.weight", [])
                layer = module.get_submodule(f"to_{part}")
                handles.append(
                    layer.register_forward_hook(
                        lambda _module, _inputs, output, seen=seen: seen.append(
                            output.float().square().mean()
                        )
                    )
                )
    try:
        evaluate(model)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.stack(seen).mean().sqrt().item() for name, seen in squares.items()}


@torch.no_grad()
def densify_time(model: SanaTransformer2DModel) -> float:
    """Refits the time embedding so that flow time itself gives what `time_scale` times it gave; in place.

    With c_noise = 1000 s the embedding's derivative by time, and with it the consistency loss, is 1000 times
    larger than it need be (SANA-Sprint, eq. 10).

    Returns:
        The relative root-mean-square error of the new embedding, over times in [0,1]; 0 for a model whose time is dense.
    """
    old_scale = model.config.time_scale
    if abs(old_scale - 1) < 1e-6:
        return 0.0
    model.config = replace(model.config, timestep_scale=0.001)
    embedder = model.get_submodule("time_embed.emb.timestep_embedder")
    assert isinstance(embedder, ScalarEmbedder)
    times = torch.linspace(0, 1, _FIT_POINTS, device=model.device)
    target = embedder(times * old_scale).double()
    spread_thresholds(embedder, _STEEPNESS)
    # Second layer: what those can say of the old embedding, in the least-squares sense.
    hidden = nn.functional.silu(embedder.linear_1(sinusoid(times))).double()
    features = torch.cat([hidden, torch.ones_like(hidden[:, :1])], dim=1)
    # A ridge: the features of so smooth a function of time are nearly dependent, and weights must stay small.
    gram = features.T @ features + _RIDGE * _FIT_POINTS * torch.eye(features.shape[1], device=model.device)
    solution = torch.linalg.solve(gram, features.T @ target)
    embedder.linear_2.weight.copy_(solution[:-1].T)
    embedder.linear_2.bias.copy_(solution[-1])
    error = (embedder(times) - target).square().mean().sqrt() / target.square().mean().sqrt()
    return float(error)


@torch.no_grad()
def spread_thresholds(embedder: ScalarEmbedder, steepness: float) -> None:
    """Starts the first layer so that its features tell values in [0,1] apart: half switch on, half off, each elsewhere.

    Random weights would not: the sinusoid's frequencies are at most 1, so over [0,1] it hardly changes.

    Args:
        embedder: of a number in [0,1]; its second layer is left alone.
        steepness: of a feature's rise with the number.
    """
    layer = embedder.linear_1
    slopes = steepness * torch.tensor([1.0, -1.0], device=layer.weight.device).repeat(layer.out_features)
    slopes = slopes[: layer.out_features]
    thresholds = torch.linspace(0, 1, layer.out_features, device=layer.weight.device)
    layer.weight.zero_()
    layer.weight[:, SINUSOID_CHANNELS // 2] = slopes  # of sin(number), which grows with the number
    layer.bias.copy_(-slopes * torch.sin(thresholds))
