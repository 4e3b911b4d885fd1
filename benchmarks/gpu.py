"""Runs every measurement on a CUDA GPU in one call: `python benchmarks/gpu.py --out results`.

Models of the published 1.6B sizes with random bf16 weights are made in memory; diffusers' modules hold the same tensors.
Sections, each written to `results/gpu.json` and `results/gpu.md` as soon as it is done, and skipped once `--minutes` are
over; a failed section is reported and the next one starts:

    parity     velocities, pictures and whole pipelines, ours beside diffusers
    latency    text to pixels at batch 1 in 1, 2 and 4 steps: ours plain, with kernels, with graphs, with both; diffusers
    stages     where the time goes, operations counted, and their share of a large matrix product's rate
    batches    pictures a second in batches of 1 to 32
    control    one step that follows a sketch
    quantized  each preset of the transformer, alone: milliseconds, megabytes, and error beside bf16
    profile    the kernels that take longest in each stage of ours, with kernels
    kernels    benchmarks/fused_kernels.py
    training   one student update: consistency and adversarial loss, backward, optimiser
    compiled   diffusers under torch.compile, graphs included; the slowest to begin, so last

Sides take turns. `--tiny` runs all of it that a CPU can on models that fit any machine, to see that it works.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from full_size import PROMPT, TRANSFORMER
from gpu_world import TINY_TRANSFORMER, World, make_world
from quantized import megabytes

from sana_sprint import SanaSprintControlNetPipeline, backends
from sana_sprint.backends.cuda.graphs import CallGraphs, StepGraphs
from sana_sprint.models.controlnet import SanaControlNetModel
from sana_sprint.quantize import PRESETS
from sana_sprint.quantize.models import quantize_model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--sections", nargs="+", choices=tuple(SECTIONS), default=tuple(SECTIONS))
    parser.add_argument("--minutes", type=float, default=20.0, help="begin no section after this")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 2, 4, 8, 16, 32))
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py measures a CUDA GPU, and this machine has none (--tiny runs on a CPU)")
    start = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    world = make_world(arguments)
    found: dict[str, Any] = {"facts": facts(world.device), "seconds": {}}
    for name in arguments.sections:
        if time.monotonic() - start > 60 * arguments.minutes:
            found[name] = {"skipped": f"after {arguments.minutes} minutes"}
            continue
        begun = time.monotonic()
        try:
            found[name] = SECTIONS[name](world)
        except Exception as error:  # a failed section must not prevent the others
            traceback.print_exc()
            found[name] = {"failed": repr(error)[:500]}
        found["seconds"][name] = round(time.monotonic() - begun, 1)
        world.accelerate(kernels=False, graphs=False)
        (arguments.out / "gpu.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        (arguments.out / "gpu.md").write_text(markdown(found), encoding="utf-8")
        print(f"{name}: {found['seconds'][name]} s", file=sys.stderr)
    print(markdown(found))
    print(json.dumps(found))


# --- Sections --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def parity(world: World) -> dict[str, float]:
    """Relative distances: of each way of ours from diffusers, and of two ways from each other as a yardstick."""
    found: dict[str, float] = {}
    latents: dict[str, Any] = {}
    for name, (switch, pipe) in world.sides().items():
        switch()
        kept: list[torch.Tensor] = []

        def keep(_: Any, i: int, t: Any, values: dict[str, Any], kept: list[Any] = kept) -> dict[str, Any]:
            kept.append(values["latents"].float())
            return values

        pictures = world.call(pipe, steps=2, callback_on_step_end=keep).float()
        latents[name] = (*kept, pictures)
    for name in latents:
        if name != "diffusers":
            for stage, mine, reference in zip(
                ("step 1", "step 2", "picture"), latents[name], latents["diffusers"], strict=True
            ):
                found[f"{name}, {stage}"] = distance(mine, reference)
    return found


def distance(x: torch.Tensor, reference: torch.Tensor) -> float:
    return float((x - reference).norm() / reference.norm())


def latency(world: World) -> dict[str, Any]:
    """Seconds from text to pixels, batch 1."""
    return {f"{steps} steps": alternate(world, steps=steps) for steps in (1, 2, 4)}


def batches(world: World) -> dict[str, Any]:
    """Pictures a second in one step; the fastest of ours beside diffusers."""
    names = ("ours, kernels + graphs" if world.has_kernels else "ours", "diffusers")
    found = {}
    for batch in world.batches:
        rows = alternate(world, names, batch=batch, rounds=max(2, world.rounds // (1 + batch // 4)))
        found[str(batch)] = {name: {**row, "pictures_s": batch / row["median"]} for name, row in rows.items()}
    return found


def stages(world: World) -> dict[str, Any]:
    """Milliseconds of each stage of one step at batch 1, and what it computes."""
    found: dict[str, Any] = {}
    for name, (switch, pipe) in world.sides().items():
        switch()
        world.call(pipe)
        with timed_stages(pipe, world.device) as times:
            for _ in range(world.rounds):
                world.call(pipe)
        found[name] = {stage: 1e3 * statistics.median(values) for stage, values in times.items()}
    world.accelerate(kernels=False, graphs=False)
    found["tflop"] = operations(world)
    return found


def operations(world: World) -> dict[str, float]:
    """TFLOP of matrix products and convolutions in each stage of ours."""
    from torch.utils.flop_counter import FlopCounterMode

    counted: dict[str, float] = {}

    def counting(name: str, function: Callable[..., Any], *values: Any, **named: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            out = function(*values, **named)
        counted[name] = counted.get(name, 0.0) + counter.get_total_flops() / 1e12
        return out

    with wrapped(world.ours, counting):
        world.call(world.ours)
    return counted


def control(world: World) -> dict[str, Any]:
    """One step that follows a sketch: published size, random projections."""
    from PIL import Image, ImageDraw

    transformer = world.ours.transformer
    branch = SanaControlNetModel.from_transformer(transformer, 1 if world.tiny else 7)
    for layer in (branch.input_block, *branch.controlnet_blocks):
        torch.nn.init.normal_(layer.weight, std=0.01)
    pipe = SanaSprintControlNetPipeline.from_pipe(world.ours, controlnet=branch)
    pipe.set_progress_bar_config(disable=True)
    sketch = Image.new("L", (world.size, world.size), 255)
    edge = world.size // 8
    ImageDraw.Draw(sketch).ellipse((edge, edge, world.size - edge, world.size - edge), outline=0, width=4)
    draw = partial(world.call, pipe, image=sketch, kind="scribble")
    found = {"plain": summary(clock({"plain": draw}, world.rounds)["plain"])}
    if world.has_kernels:
        world.accelerate(kernels=True, graphs=True)
        pipe.enable_fused_kernels()
        backends.record(branch, CallGraphs())
        found["kernels + graphs"] = summary(clock({"fast": draw}, world.rounds)["fast"])
    return found


@torch.no_grad()
def quantized(world: World) -> dict[str, Any]:
    """Times a transformer step in each preset, by CUDA graphs on a GPU, so that only the device's work is counted."""
    plain = world.ours.transformer
    side = world.size // 32
    embeds, mask = world.ours.encode_prompt(PROMPT, padding="longest")
    latent = torch.randn(1, plain.config.in_channels, side, side, device=world.device)
    one = torch.full((1,), 0.9, device=world.device)

    def evaluate(model: Any) -> torch.Tensor:
        context = model.encode_caption(embeds, mask)
        return model(latent, one, context, 4.5 * one).float()

    expected = evaluate(plain)
    found: dict[str, Any] = {}
    for preset in (None, *PRESETS):
        model = copy.deepcopy(plain)
        try:
            if preset:
                quantize_model(model, "transformer", preset)
        except ValueError as error:
            found[str(preset)] = {"refused": str(error)}
            continue
        backends.use_kernels(model, world.has_kernels)
        error = distance(evaluate(model), expected)
        backends.record(model, StepGraphs() if world.has_kernels else None)
        row = summary(clock({"step": partial(evaluate, model)}, world.rounds)["step"])
        found[preset or "bf16"] = {**row, "MB": megabytes(model), "error": error}
        del model
    return found


def profile(world: World) -> dict[str, Any]:
    """Milliseconds of the longest kernels of each stage, summed over a call."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    world.accelerate(kernels=world.has_kernels, graphs=False)
    found: dict[str, Any] = {}
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if world.has_kernels else [])]

    def profiling(stage: str, function: Callable[..., Any], *values: Any, **named: Any) -> Any:
        with torch.profiler.profile(activities=kinds) as profiler:
            out = function(*values, **named)
            synchronize()
        where = DeviceType.CUDA if world.has_kernels else DeviceType.CPU
        rows = [row for row in profiler.key_averages() if row.device_type == where]
        key = "self_device_time_total" if world.has_kernels else "self_cpu_time_total"
        longest = sorted(rows, key=lambda row: -getattr(row, key))
        found[stage] = {
            "all": f"{sum(getattr(row, key) for row in rows) / 1e3:.2f} ms",
            **{f"{row.count} x {row.key[:90]}": f"{getattr(row, key) / 1e3:.3f} ms" for row in longest[:14]},
        }
        return out

    world.call(world.ours)
    with wrapped(world.ours, profiling):
        world.call(world.ours)
    return found


def kernels(world: World) -> dict[str, Any]:
    """The table of benchmarks/fused_kernels.py, with other block sizes."""
    if not world.has_kernels:
        return {"skipped": "needs CUDA"}
    path = world.out / "kernels.json"
    command = [
        sys.executable,
        str(Path(__file__).with_name("fused_kernels.py")),
        "--sweep",
        "--json",
        str(path),
    ]
    subprocess.run(command, check=True, timeout=420)
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def training(world: World) -> dict[str, Any]:
    """Seconds of one student update of benchmarks/generator_step.py's side of ours, on this device."""
    import generator_step

    fields = {**(TINY_TRANSFORMER if world.tiny else TRANSFORMER), "guidance_embeds": True}
    generator_step.SHAPES["session"] = (fields, 2 if world.tiny else 4, 4 if world.tiny else 32, 300)
    arguments = argparse.Namespace(shape="session", batch=None, full_captions=False)
    task, device = generator_step.make_task(arguments), world.device
    side = generator_step.Ours(task, "bf16", device)
    side.task = replace(task, **{name: getattr(task, name).to(device) for name in ("u0", "text", "mask")})
    side.autocast = torch.autocast(device.type, torch.bfloat16)
    with device:  # random numbers come from the same device
        times = clock({"update": side.step}, max(2, world.rounds // 3))["update"]
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return {"batch": len(task.u0), **summary(times), "peak_gib": peak}


def compiled(world: World) -> dict[str, Any]:
    """Times compiled diffusers beside ours with kernels and graphs. The first call compiles for minutes."""
    if not world.has_kernels:
        return {"skipped": "needs CUDA"}
    begun = time.monotonic()
    world.theirs.transformer.compile(mode="reduce-overhead")
    world.theirs.vae.decode = torch.compile(world.theirs.vae.decode)
    world.call(world.theirs)
    found: dict[str, Any] = {"diffusers, first call s": time.monotonic() - begun}
    for steps in (1, 2, 4):
        found[f"{steps} steps"] = alternate(world, ("ours, kernels + graphs", "diffusers"), steps=steps)
    return found


SECTIONS: dict[str, Callable[[World], dict[str, Any]]] = {
    section.__name__: section
    for section in (
        parity,
        latency,
        stages,
        batches,
        control,
        quantized,
        profile,
        kernels,
        training,
        compiled,
    )
}


def facts(device: torch.device) -> dict[str, Any]:
    import diffusers
    import transformers

    versions = {"diffusers": diffusers.__version__, "transformers": transformers.__version__}
    if device.type != "cuda":
        return {"torch": torch.__version__, **versions, "device": "cpu"}
    from fused_kernels import copy_bandwidth

    return {
        "torch": torch.__version__,
        **versions,
        "device": torch.cuda.get_device_name(),
        "copy_gb_s": round(copy_bandwidth()),
        "matmul_tflop_s": round(matmul_rate()),
    }


def matmul_rate(side: int = 8192) -> float:
    """Measures TFLOP/s of a large bf16 matrix product on random data, the roofline's reference."""
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    action = partial(torch.mm, a, b)
    return 2 * side**3 / statistics.median(clock({"product": action}, 10)["product"]) / 1e12


# --- Measuring -------------------------------------------------------------------------------------------------------


def alternate(
    world: World, names: tuple[str, ...] = (), steps: int = 1, batch: int = 1, rounds: int | None = None
) -> dict[str, dict[str, float]]:
    """Seconds of text to pixels by each side, in turns."""
    sides = {name: side for name, side in world.sides().items() if not names or name in names}
    switches = {name: switch for name, (switch, _) in sides.items()}
    actions = {name: partial(world.call, pipe, steps, batch) for name, (_, pipe) in sides.items()}
    times = clock(actions, world.rounds if rounds is None else rounds, switches)
    return {name: summary(values) for name, values in times.items()}


def clock(
    actions: dict[str, Callable[[], Any]], rounds: int, switches: dict[str, Callable[[], None]] | None = None
) -> dict[str, list[float]]:
    """Seconds until the device has finished, after two rounds that do not count. Switches are not timed."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds + 2):
        for name, action in actions.items():
            if switches:
                switches[name]()
            synchronize()
            start = time.perf_counter()
            action()
            synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: values[2:] for name, values in times.items()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def summary(times: list[float]) -> dict[str, float]:
    return {"median": statistics.median(times), "p90": sorted(times)[round(0.9 * (len(times) - 1))]}


@contextmanager
def wrapped(pipe: Any, around: Callable[..., Any]) -> Iterator[None]:
    """Calls of the text encoder, the transformer and the decoder go through `around(stage, function, ...)`."""
    parts = {
        "text": (pipe.text_encoder, "forward"),
        "transformer": (pipe.transformer, "forward"),
        "decode": (pipe.vae, "decode"),
    }
    for stage, (owner, name) in parts.items():
        setattr(owner, name, partial(around, stage, getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name in parts.values():
            delattr(owner, name)


@contextmanager
def timed_stages(pipe: Any, device: torch.device) -> Iterator[dict[str, list[float]]]:
    """Seconds of each stage in each call. Waiting for the device between stages costs a little of their overlap."""
    times: dict[str, list[float]] = {}

    def around(stage: str, function: Callable[..., Any], *values: Any, **named: Any) -> Any:
        synchronize()
        start = time.perf_counter()
        out = function(*values, **named)
        synchronize()
        times.setdefault(stage, []).append(time.perf_counter() - start)
        return out

    with wrapped(pipe, around):
        yield times


# --- Report ----------------------------------------------------------------------------------------------------------


def markdown(found: dict[str, Any]) -> str:
    """Every section as a list of `path: value`, medians in milliseconds."""
    lines = []
    for section, values in found.items():
        lines += [f"\n## {section}\n", "| what | value |", "|---|---|"]
        lines += [f"| {path} | {value} |" for path, value in flat(values)]
    return "\n".join(lines)


def flat(values: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(values, dict) and {"median", "p90"} <= values.keys():
        rest = "".join(f", {k} {v:.4g}" for k, v in values.items() if k not in ("median", "p90"))
        yield path or "all", f"{1e3 * values['median']:.1f} ms (p90 {1e3 * values['p90']:.1f}){rest}"
    elif isinstance(values, dict):
        for key, value in values.items():
            yield from flat(value, f"{path}: {key}" if path else str(key))
    elif isinstance(values, list):
        for number, value in enumerate(values[:8]):
            yield from flat(value, f"{path} {number}")
    else:
        yield path, f"{values:.4g}" if isinstance(values, float) else str(values)


if __name__ == "__main__":
    main()
