"""Measures time, memory and error of each component in every quantisation preset: `python benchmarks/quantized.py [MODEL]`.

MODEL is "emoji" (which is judged too) or a pipeline folder, such as the one `benchmarks/full_size.py` makes. The error of a
component is that of its output, relative (root mean square) to the unquantised one on the same input. Both run in turn;
times are medians, by the clock on the wall or, on a machine with other work, of the processor (`--cpu-time`, where the
time of all threads is added). `--sensitive` quantises one small part at a time instead, which shows why those
parts are left alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sana_sprint import SanaSprintPipeline
from sana_sprint.evaluate.compositional import draw, import_judge, score
from sana_sprint.quantize import PRESETS
from sana_sprint.quantize.layers import QuantizedConv2d, QuantizedLinear

PROMPTS = ["a red apple on a blue background", "two green cars"]
COMPONENTS = ("text_encoder", "transformer", "vae")
FLOW_TIMES = (0.95, 0.6)  # about those of two steps
SENSITIVE = {
    "transformer": ("patch_embed.proj", "time_embed", "caption_projection", "proj_out", "transformer_blocks"),
    "vae": ("decoder.conv_in", "decoder.conv_out", "decoder.up_blocks"),
}


def main() -> None:
    """Prints Markdown tables, then one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="emoji")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=list(PRESETS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--side", type=int, help="latent cells per side; the model's own if left out")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--count", type=int, default=60, help="judged prompts of emoji, a multiple of 6; 0: none"
    )
    parser.add_argument("--sensitive", action="store_true")
    parser.add_argument("--cpu-time", action="store_true")
    arguments = parser.parse_args()
    make_rows = sensitive_rows if arguments.sensitive else component_rows
    rows = list(make_rows(arguments))
    print_table(rows)
    if arguments.model == "emoji" and arguments.count and not arguments.sensitive:
        judged = list(judged_rows(arguments))
        print_table(judged)
        rows += judged
    print(json.dumps(rows))


# ----- components -----------------------------------------------------------------------------------------------------


def load(arguments: argparse.Namespace, quantization: Any = None) -> SanaSprintPipeline:
    pipeline = SanaSprintPipeline.from_pretrained(
        arguments.model,
        torch_dtype=torch.bfloat16,
        device_map=arguments.device,
        quantization_config=quantization,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def component_rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    plain = load(arguments)
    for component in COMPONENTS:
        work = workload(component, plain, arguments)
        expected = work(plain)
        for preset in arguments.presets:
            row: dict[str, Any] = {"component": component, "preset": preset}
            try:
                quantised = load(arguments, {component: preset})
            except ValueError as error:
                yield {**row, "refused": str(error)}
                continue
            found = work(quantised)
            before, after = alternate(partial(work, plain), partial(work, quantised), arguments)
            sizes = [megabytes(getattr(it, component)) for it in (plain, quantised)]
            yield {
                **row,
                "ms": round(after, 1),
                "faster": round(before / after, 2),
                "MB": round(sizes[1], 1),
                "smaller": round(sizes[0] / sizes[1], 2),
                "error": round(relative(found, expected), 4),
            }


@torch.no_grad()
def workload(
    component: str, plain: SanaSprintPipeline, arguments: argparse.Namespace
) -> Callable[[SanaSprintPipeline], Tensor]:
    """Returns the component's call; its inputs are made by the unquantised components."""
    config = plain.transformer.config
    side = arguments.side or config.sample_size
    generator = torch.Generator().manual_seed(0)
    shape = (1, config.in_channels, side, side)
    noise = torch.randn(shape, generator=generator).to(arguments.device)
    embeds, mask = plain.encode_prompt(PROMPTS, padding="longest")
    if component == "text_encoder":

        def encode(pipe: SanaSprintPipeline) -> Tensor:
            return pipe.encode_prompt(PROMPTS, padding="longest")[0][mask.bool()]

        return encode
    if component == "vae":
        pixels = side * plain.vae_scale_factor
        size = {"height": pixels, "width": pixels, "use_resolution_binning": False}
        drawn: Any = plain(PROMPTS[0], latents=noise, output_type="latent", seed=0, **size)
        raw = (drawn.images / plain.vae.config.scaling_factor).to(torch.bfloat16)
        return torch.no_grad()(lambda pipe: pipe.vae.decode(raw))

    @torch.no_grad()
    def evaluate(pipe: SanaSprintPipeline) -> Tensor:
        context = pipe.transformer.encode_caption(embeds[:1], mask[:1])
        guidance = torch.full((1,), 4.5, device=noise.device)
        times = [torch.full((1,), t, device=noise.device) for t in FLOW_TIMES]
        return torch.cat([pipe.transformer(noise, t, context, guidance) for t in times])

    return evaluate


def alternate(
    one: Callable[[], object], other: Callable[[], object], arguments: argparse.Namespace
) -> tuple[float, float]:
    """Median milliseconds of each."""
    times: tuple[list[float], list[float]] = [], []
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    for _ in range(arguments.repeats):
        for run, seconds in zip((one, other), times, strict=True):
            start = clock()
            run()
            if torch.device(arguments.device).type == "cuda":
                torch.cuda.synchronize()
            seconds.append(clock() - start)
    return 1e3 * statistics.median(times[0]), 1e3 * statistics.median(times[1])


def megabytes(module: nn.Module) -> float:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


# ----- pictures -------------------------------------------------------------------------------------------------------


def judged_rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The judge's score of the whole pipeline in each preset, all three components together."""
    sys.path.append(str(Path(__file__).parents[1]))  # where recipes/ lies
    judge = import_judge("recipes.emoji.judge")
    scenes = judge.evaluation_scenes(arguments.count)
    for preset in (None, *arguments.presets):
        try:
            pipeline = load(arguments, preset and dict.fromkeys(COMPONENTS, preset))
        except ValueError as error:
            yield {"preset": preset, "refused": str(error)}
            continue
        pictures = draw(pipeline, [scene.caption for scene in scenes], num_steps=2, guidance=4.5)
        overall = score(judge, pictures, scenes, name=str(preset))["overall"]
        yield {"preset": preset or "bf16", "judged right": round(overall, 4), "prompts": arguments.count}


# ----- layers left unquantised ---------------------------------------------------------------------------------------------


def sensitive_rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Error and share of the weights of each part, when it alone is rounded."""
    plain = load(arguments)
    for component, parts in SENSITIVE.items():
        work = workload(component, plain, arguments)
        expected = work(plain)
        for preset in arguments.presets:
            if preset == "fp8":
                continue  # in the parts that are left alone there are layers too small for its kernels
            for part in parts:
                pipeline = load(arguments)
                count = quantize_part(getattr(pipeline, component), part, preset)
                total = sum(parameter.numel() for parameter in getattr(plain, component).parameters())
                error = relative(work(pipeline), expected)
                row = {"component": component, "preset": preset, "part": part}
                yield {**row, "share of weights": round(count / total, 4), "error": round(error, 4)}


def quantize_part(model: nn.Module, part: str, preset: str) -> int:
    """Quantise the layers in `part` whatever the rules say; returns how many numbers they held."""
    count = 0
    for name, layer in list(model.named_modules()):
        if not f"{name}.".startswith(f"{part}.") or not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        depthwise = isinstance(layer, nn.Conv2d) and layer.groups > 1
        if depthwise or (layer.weight.shape[0] % 8 and preset == "int8") or layer.weight[0].numel() % 8:
            continue
        on_pictures = isinstance(layer, nn.Conv2d) and "decoder" in name
        kind = QuantizedConv2d if on_pictures else QuantizedLinear
        owner, _, leaf = name.rpartition(".")
        count += layer.weight.numel()
        setattr(model.get_submodule(owner), leaf, kind.of(layer, preset))
    return count


def print_table(rows: list[dict[str, Any]]) -> None:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    print(f"| {' | '.join(keys)} |", "|---" * len(keys) + "|", sep="\n")
    for row in rows:
        print(f"| {' | '.join(str(row.get(key, '')) for key in keys)} |")
    print()


if __name__ == "__main__":
    main()
