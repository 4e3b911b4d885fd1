"""Measures the time that a control branch adds to a step: `python benchmarks/controlnet.py`.

Alternates the transformer's step without and with a control branch on random bf16 weights of the published 1.6B size, with 7
copies of its 20 blocks, at the token count of a 1024 px picture; the work done once per picture is timed too. The added
time should stay below 0.6 of the base step; counted in blocks it would be 7/20.

`--size embedded` is a small model for a quick check. With `--device cuda` the clock waits for the device.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sana_sprint import backends
from sana_sprint.models.controlnet import TOPOLOGIES, ControlContext, SanaControlNetModel
from sana_sprint.models.transformer import CaptionContext, SanaTransformer2DModel, TransformerConfig

GOAL = 0.6
SPRINT = {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True}
# name -> (config, copies, latent side, caption tokens)
SIZES: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "1.6b": (SPRINT, 7, 32, 300),
    "embedded": (
        {
            **SPRINT,
            "in_channels": 16,
            "out_channels": 16,
            "num_attention_heads": 8,
            "num_layers": 8,
            "num_cross_attention_heads": 8,
            "cross_attention_head_dim": 32,
            "cross_attention_dim": 256,
            "caption_channels": 256,
            "sample_size": 8,
        },
        3,
        8,
        40,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="1.6b")
    parser.add_argument("--topology", choices=TOPOLOGIES, default="diffusers")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with torch.no_grad():
        report(measure(arguments), arguments)


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each part."""
    fields, copies, side, tokens = SIZES[arguments.size]
    device = torch.device(arguments.device)
    with device:
        transformer = SanaTransformer2DModel(TransformerConfig(**fields)).bfloat16().eval()
        branch = SanaControlNetModel.from_transformer(transformer, copies, arguments.topology)
        for model in (transformer, branch):
            backends.apply(model)
        # A trained branch has no zero projections.
        for layer in (branch.input_block, *branch.controlnet_blocks):
            torch.nn.init.normal_(layer.weight, std=0.01)
        latent = torch.randn(1, transformer.config.in_channels, side, side)
        text = torch.randn(1, tokens, transformer.config.caption_channels, dtype=torch.bfloat16)
        flow_t, guidance = torch.tensor([0.8]), torch.tensor([4.5])
    captions = transformer.encode_caption(text)
    context = branch.encode(transformer, latent, text)
    step = partial(run_step, transformer, branch, latent, flow_t, captions, guidance)
    actions: dict[str, Callable[[], object]] = {
        "base": partial(step, None),
        "controlled": partial(step, context),
        "once": lambda: branch.encode(transformer, latent, text),
    }
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(arguments.rounds + 1):
        for name, action in actions.items():  # alternating, so that a busy moment affects all alike
            times[name].append(seconds(action, device))
    return {name: statistics.median(found[1:]) for name, found in times.items()}  # the first is a warm-up


def run_step(
    transformer: SanaTransformer2DModel,
    branch: SanaControlNetModel,
    latent: Tensor,
    flow_t: Tensor,
    captions: CaptionContext,
    guidance: Tensor,
    context: ControlContext | None,
) -> Tensor:
    """Runs one network evaluation, with control unless `context` is None."""
    control = None if context is None else branch.steer(latent, flow_t, context, guidance)
    velocity: Tensor = transformer(latent, flow_t, captions, guidance, control)
    return velocity


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """Measures wall time, waiting for the device."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - start


def report(found: dict[str, float], arguments: argparse.Namespace) -> None:
    added = (found["controlled"] - found["base"]) / found["base"]
    print(f"{arguments.size}, {arguments.topology}, bf16, {arguments.device}, {arguments.threads} thread(s)")
    for name, value in found.items():
        print(f"{name:<12}{1000 * value:>10.1f} ms")
    print(f"added per step: {added:.2f} of the base's (goal: at most {GOAL})")
    facts = {"torch": torch.__version__, "machine": platform.machine(), **vars(arguments)}
    print(json.dumps({**facts, "seconds": found, "added": round(added, 3)}))


if __name__ == "__main__":
    main()
