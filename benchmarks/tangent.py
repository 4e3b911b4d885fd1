"""Measures the cost of dF/dt in forward passes: `python benchmarks/tangent.py`.

Times a plain forward pass (no gradient) and the three kinds of `train/losses/tangent.py` in turn, over and
over, on random weights of two shapes: the embedded model's, and some blocks of the published 0.6B model's. Beside the
times stands each tangent's error: its relative distance from the tangent of the same weights in fp64, in the norm.

With one thread, times are the processor's for this process, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor

from sana_sprint import backends
from sana_sprint.backends.explicit_attention import set_fused_attention
from sana_sprint.models.transformer import CaptionContext, SanaTransformer2DModel, TransformerConfig
from sana_sprint.train.losses.tangent import WAYS, TangentKind
from sana_sprint.trigflow import flow_denoiser, lognormal_times

QK_NORM = {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True}
# name -> (config, batch, latent side, caption tokens)
SHAPES: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "embedded": (
        {
            **QK_NORM,
            "in_channels": 16,
            "out_channels": 16,
            "num_attention_heads": 8,
            "attention_head_dim": 32,
            "num_layers": 8,
            "num_cross_attention_heads": 8,
            "cross_attention_head_dim": 32,
            "cross_attention_dim": 256,
            "caption_channels": 256,
            "sample_size": 8,
            "interpolation_scale": 1.0,
        },
        32,
        8,
        40,
    ),
    "0.6b": (
        {
            **QK_NORM,
            "num_attention_heads": 36,
            "num_layers": 4,  # of 28: all are alike
            "num_cross_attention_heads": 16,
            "cross_attention_head_dim": 72,
            "cross_attention_dim": 1152,
        },
        2,
        16,
        300,
    ),
}


def main() -> None:
    """Prints a table and one JSON line for every shape and precision."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=tuple(SHAPES))
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=("fp32", "bf16"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for shape in arguments.shapes:
        for precision in arguments.precisions:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), torch.no_grad():
                report(shape, precision, measure(shape, arguments), arguments)


def measure(shape: str, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Measures milliseconds, forward passes and error of each method."""
    values, batch, side, tokens = SHAPES[shape]
    torch.manual_seed(0)
    transformer = backends.apply(SanaTransformer2DModel(TransformerConfig.from_dict(values)).eval())
    for parameter in transformer.parameters():
        if parameter.ndim > 1:  # of fan-in scale, so that F depends on every layer
            parameter.normal_(0, parameter[0].numel() ** -0.5)
    set_fused_attention(transformer.blocks, False)  # as the student stage does on a CPU, where it is faster
    torch.empty(
        31 * 2**18
    )  # 31 MiB: from now on glibc keeps freed blocks of that size, as it does in training
    mask = torch.arange(tokens) < torch.randint(tokens // 4, tokens, (batch, 1))
    context = transformer.encode_caption(
        torch.randn(batch, tokens, transformer.config.caption_channels), mask
    )
    u, du = torch.randn(2, batch, transformer.config.in_channels, side, side)
    t = lognormal_times(batch, mean=0.2, std=1.6)
    factor = torch.cos(t) * torch.sin(t)  # as in training: see `tangent.make_tangent`
    inputs = (u, t, du * factor[:, None, None, None], factor, torch.full((batch,), 4.5))

    def forward() -> Tensor:
        return flow_denoiser(lambda x, s: transformer(x, s, context, inputs[-1]))(u, t)

    ways: dict[str, Callable[[], Any]] = {"forward": forward}
    for kind in get_args(TangentKind):
        ways[kind] = lambda kind=kind: WAYS[kind](transformer, context, *inputs)[1]
    times = alternate(
        ways, arguments.rounds, time.process_time if arguments.threads == 1 else time.perf_counter
    )
    results = {
        name: {
            "ms": 1e3 * statistics.median(times[name]),
            "passes": statistics.median(a / b for a, b in zip(times[name], times["forward"], strict=True)),
        }
        for name in ways
    }
    tangents = {kind: ways[kind]() for kind in get_args(TangentKind)}
    exact = exact_tangent(transformer, context, inputs)
    for kind, tangent in tangents.items():
        results[kind]["error"] = ((tangent - exact).norm() / exact.norm()).item()
    return results


def alternate(
    ways: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Times every method in every round, after one warm-up round; seconds."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, run in ways.items():
            start = clock()
            run()
            times[name].append(clock() - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def exact_tangent(
    transformer: SanaTransformer2DModel, context: CaptionContext, inputs: tuple[Tensor, ...]
) -> Tensor:
    """The tangent in fp64, of the same keys and values, so that only the pass itself is judged."""
    wide = CaptionContext(
        tuple(key.double() for key in context.keys),
        tuple(value.double() for value in context.values),
        context.bias,
    )
    with torch.autocast("cpu", enabled=False):
        return WAYS["dual"](transformer.double(), wide, *(x.double() for x in inputs))[1]


def report(
    shape: str, precision: str, results: dict[str, dict[str, float]], arguments: argparse.Namespace
) -> None:
    print(f"\n{shape}, {precision}, {arguments.threads} thread(s), medians of {arguments.rounds} rounds")
    print(f"{'':<12}{'ms':>9}{'passes':>8}{'error':>10}")
    for name, values in results.items():
        error = f"{values['error']:.1e}" if "error" in values else ""
        print(f"{name:<12}{values['ms']:>9.1f}{values['passes']:>8.2f}{error:>10}")
    machine = {"torch": torch.__version__, "machine": platform.machine(), "threads": arguments.threads}
    print(json.dumps({"shape": shape, "precision": precision, **machine, "results": results}))


if __name__ == "__main__":
    main()
