"""Times each part, ours beside diffusers on the same random bf16 weights, alternating in one process.

    OMP_NUM_THREADS=2 python benchmarks/speed.py decode --sizes 512,1024 --openvino   # pip install openvino
    OMP_NUM_THREADS=2 python benchmarks/speed.py pipeline --steps 1,2,4 --sizes 512,1024,2048 --batches 1,4,8
    OMP_NUM_THREADS=2 python benchmarks/speed.py embedded
    python benchmarks/speed.py decode transformer pipeline cold embedded --device cuda --compiled

Parts: `transformer` (one evaluation), `decode`, `pipeline` (prompt embeddings to pixels, so that both sides start with the
same), `embedded` (prompt to PNG with the model that ships) and `cold` (the command in a process of its own). Text
encoding is in `text_encoding.py`, memory of a whole picture in `full_size.py`, ControlNet in `controlnet.py`. Prints a table
and one JSON line. Operations are counted from shapes; `share` is theirs per second over the measured matrix peak. Bytes are what all
operations read and write, counted from shapes too, and `traffic` theirs per second over the measured speed of a copy: above 1,
much of it stayed in caches. A case whose share is near 1 cannot be made faster in its dtype, only with fewer operations.
`cpu` is the share of its threads' time that the process had: well below 1, other programs took the rest and times mean little.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import torch
from full_size import AUTOENCODER, TRANSFORMER, random_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

PROMPT_TOKENS = 20
SMALL_TRANSFORMER = {
    **TRANSFORMER,
    "num_attention_heads": 4,
    "num_layers": 2,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 32,
    "cross_attention_dim": 128,
    "caption_channels": 64,
}
_FEW = [16, 16, 32, 32, 64, 64]
SMALL_AUTOENCODER = {**AUTOENCODER, "encoder_block_out_channels": _FEW, "decoder_block_out_channels": _FEW}

Case = tuple[str, dict[str, Callable[[], object]]]  # what is measured, and its sides


def main() -> None:
    arguments = parse()
    torch.manual_seed(0)
    cases = {
        "transformer": transformer_cases,
        "decode": decode_cases,
        "pipeline": pipeline_cases,
        "embedded": embedded_cases,
        "cold": cold_cases,
    }
    rows = []
    with torch.inference_mode():
        peak = matrix_peak(arguments.device), copy_peak(arguments.device)
        for part in arguments.parts:
            for name, sides in cases[part](arguments):
                rows += measure(name, sides, arguments, peak)
                print(f"{name}: done", file=sys.stderr)
    report(rows, peak, arguments)


def parse() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=("transformer", "decode", "pipeline", "embedded", "cold"))
    parser.add_argument("--sizes", type=numbers, default=[1024], help="pixels a side, such as 512,1024")
    parser.add_argument("--steps", type=numbers, default=[1, 2])
    parser.add_argument("--batches", type=numbers, default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compiled", action="store_true", help="torch.compile of diffusers as a third side")
    parser.add_argument(
        "--openvino", action="store_true", help="decode by OpenVINO too, from diffusers' graph and from ours"
    )
    parser.add_argument("--small", action="store_true", help="tiny models, to see that this works")
    return parser.parse_args()


# ----- parts -----------------------------------------------------------------------------------------------


def models(kind: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Side -> transformer or autoencoder, of the same weights."""
    import diffusers

    from sana_sprint import backends
    from sana_sprint.models.autoencoder import AutoencoderConfig, AutoencoderDC
    from sana_sprint.models.transformer import SanaTransformer2DModel, TransformerConfig

    if kind == "transformer":
        values = SMALL_TRANSFORMER if arguments.small else TRANSFORMER
        ours = random_weights(lambda: SanaTransformer2DModel(TransformerConfig.from_dict(values)))
        make: Callable[[], Any] = lambda: diffusers.SanaTransformer2DModel(**values)  # noqa: E731
    else:
        values = SMALL_AUTOENCODER if arguments.small else AUTOENCODER
        ours = random_weights(lambda: AutoencoderDC(AutoencoderConfig.from_dict(values)))
        make = lambda: diffusers.AutoencoderDC(**values)  # noqa: E731
    with torch.device("meta"):
        theirs = make()
    theirs.load_state_dict(ours.state_dict(), assign=True)
    backends.apply(ours)
    for model in (ours, theirs):
        model.to(arguments.device).eval().requires_grad_(False)
    return {"ours": ours, "diffusers": theirs}


def decode_cases(arguments: argparse.Namespace) -> Iterator[Case]:
    sides = models("vae", arguments)
    compiled = torch.compile(sides["diffusers"].decode) if arguments.compiled else None
    for size, batch in product(arguments.sizes, arguments.batches):
        latent = torch.randn(batch, 32, size // 32, size // 32, device=arguments.device).bfloat16()
        calls: dict[str, Callable[[], object]] = {
            "ours": lambda latent=latent: sides["ours"].decode(latent),
            "diffusers": lambda latent=latent: sides["diffusers"].decode(latent, return_dict=False),
        }
        if compiled is not None:
            calls["diffusers compiled"] = lambda latent=latent: compiled(latent, return_dict=False)
        if arguments.openvino:
            for side in ("diffusers", "ours"):
                calls[f"openvino, graph: {side}"] = in_openvino(sides[side].decoder, latent)
        yield f"decode {size} px x{batch}", calls


def in_openvino(decoder: torch.nn.Module, latent: torch.Tensor) -> Callable[[], object]:
    """The same decoder, exported and compiled for this shape, in bf16 on as many threads as torch has."""
    import openvino

    # Exported in fp32, as its users do: the plugin itself casts to bf16 what gains by it.
    wide = copy.deepcopy(decoder).float()
    with torch.no_grad():
        graph = openvino.convert_model(torch.export.export(wide, (latent.float(),)))
    graph.reshape(list(latent.shape))
    hints = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(graph, "CPU", hints)
    numbers = latent.float().numpy()
    wanted = decoder(latent).float()
    error = (torch.from_numpy(compiled([numbers])[0]) - wanted).norm() / wanted.norm()
    if error > 0.05:
        raise AssertionError(f"OpenVINO's picture differs by {error:.3f} of its size")
    return lambda: compiled([numbers])


def transformer_cases(arguments: argparse.Namespace) -> Iterator[Case]:
    sides = models("transformer", arguments)
    ours, theirs = sides["ours"], sides["diffusers"]
    compiled = torch.compile(theirs) if arguments.compiled else None
    for size, batch in product(arguments.sizes, arguments.batches):
        device = arguments.device
        x = torch.randn(batch, 32, size // 32, size // 32, device=device).bfloat16()
        text = torch.randn(batch, PROMPT_TOKENS, ours.config.caption_channels, device=device).bfloat16()
        t, guidance = torch.full((batch,), 0.8, device=device), torch.full((batch,), 4.5, device=device)
        context = ours.encode_caption(text)
        # The published pipeline pads to 300 tokens and masks the rest.
        padded = torch.nn.functional.pad(text, (0, 0, 0, 300 - PROMPT_TOKENS))
        mask = (torch.arange(300, device=device) < PROMPT_TOKENS).long().expand(batch, -1)

        def published(model: Any, x=x, padded=padded, mask=mask, t=t, guidance=0.1 * guidance) -> object:
            return model(x, padded, t, guidance=guidance, encoder_attention_mask=mask, return_dict=False)

        calls: dict[str, Callable[[], object]] = {
            "ours": lambda x=x, t=t, c=context, g=guidance: ours(x, t, c, g),
            "diffusers": lambda published=published: published(theirs),
        }
        if compiled is not None:
            calls["diffusers compiled"] = lambda published=published: published(compiled)
        yield f"transformer {size} px x{batch}", calls


def pipeline_cases(arguments: argparse.Namespace) -> Iterator[Case]:
    import diffusers

    import sana_sprint

    transformers, vaes = models("transformer", arguments), models("vae", arguments)
    pipes = {}
    for side, library in (("ours", sana_sprint), ("diffusers", diffusers)):
        pipes[side] = library.SanaSprintPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=vaes[side],
            transformer=transformers[side],
            scheduler=library.SCMScheduler(),
        )
        pipes[side].set_progress_bar_config(disable=True)
    if arguments.device != "cpu":
        pipes["ours"].enable_cuda_graphs()
    width = transformers["ours"].config.caption_channels
    for size, batch, steps in product(arguments.sizes, arguments.batches, arguments.steps):
        embeds = torch.randn(batch, 300, width, device=arguments.device).bfloat16()
        mask = (torch.arange(300, device=arguments.device) < PROMPT_TOKENS).long().expand(batch, -1)
        settings = {
            "num_inference_steps": steps,
            "intermediate_timesteps": 1.3 if steps == 2 else None,
            "height": size,
            "width": size,
            "use_resolution_binning": False,
            "output_type": "pt",
        }
        calls = {
            "ours": lambda e=embeds[:, :PROMPT_TOKENS], m=mask[:, :PROMPT_TOKENS], s=settings: pipes["ours"](
                prompt_embeds=e, prompt_attention_mask=m, **s
            ),
            "diffusers": lambda e=embeds, m=mask, s=settings: pipes["diffusers"](
                prompt_embeds=e, prompt_attention_mask=m, **s
            ),
        }
        yield f"pipeline {size} px x{batch}, {steps} steps", calls


def embedded_cases(arguments: argparse.Namespace) -> Iterator[Case]:
    from sana_sprint import SanaSprintPipeline

    pipe = SanaSprintPipeline.from_pretrained("emoji").to(arguments.device)
    pipe.set_progress_bar_config(disable=True)

    def draw(batch: int, steps: int) -> None:
        prompts = ["two apples on a blue background"] * batch
        for image in pipe(prompts, num_inference_steps=steps, seed=7).images:
            image.save(BytesIO(), "PNG")

    for batch, steps in product((1, 8), arguments.steps):
        yield f"embedded x{batch}, {steps} steps", {"ours": lambda b=batch, s=steps: draw(b, s)}


def cold_cases(arguments: argparse.Namespace) -> Iterator[Case]:
    def command(*words: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, *words], check=True, capture_output=True)

    with tempfile.TemporaryDirectory() as folder:
        generate = ("-m", "sana_sprint", "generate", "a red heart", "--seed", "7", "-o", folder)
        yield "cold import sana_sprint", {"ours": command("-c", "import sana_sprint")}
        yield "cold generate", {"ours": command(*generate)}


# ----- measuring ------------------------------------------------------------------------------------------------------


def measure(
    name: str,
    sides: dict[str, Callable[[], object]],
    arguments: argparse.Namespace,
    peak: tuple[float, float],
) -> list[dict[str, Any]]:
    """One row per side. The first call of each warms up and is counted."""
    operations, bytes_ = {}, {}
    for side, call in sides.items():
        with FlopCounterMode(display=False) as counter, ByteCounter() as traffic:
            if "compiled" not in side:
                call()
        operations[side] = counter.get_total_flops() or None
        bytes_[side] = traffic.total or None
        call()
    times: dict[str, list[float]] = {side: [] for side in sides}
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(arguments.rounds):
        for side, call in sides.items():
            times[side].append(seconds(call, arguments.device))
    cpu_share = (time.process_time() - cpu) / (time.perf_counter() - wall) / torch.get_num_threads()
    base = statistics.median(times["ours"])
    rows = []
    for side, found in times.items():
        median = statistics.median(found)
        rows.append(
            {
                "case": name,
                "side": side,
                "median_s": median,
                "p90_s": sorted(found)[int(0.9 * (len(found) - 1) + 0.5)],
                "ratio": median / base,
                "operations": operations[side],
                "share": operations[side] and operations[side] / median / peak[0],
                "bytes": bytes_[side],
                "traffic": bytes_[side] and bytes_[side] / median / peak[1],
                "cpu": cpu_share,
                "peak_gib": peak_memory(sides[side], arguments.device),
            }
        )
    return rows


class ByteCounter(TorchDispatchMode):
    """Adds up the bytes of what every operation reads and writes; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten.empty.memory_format:
            tensors = {id(each): each for each in tree_leaves((args, kwargs, out)) if torch.is_tensor(each)}
            self.total += sum(each.nbytes for each in tensors.values())
        return out


def seconds(call: Callable[[], object], device: str) -> float:
    """Measures wall time, waiting for the device."""
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def peak_memory(call: Callable[[], object], device: str) -> float | None:
    """GiB on a GPU. A process has one high-water mark on a CPU: `full_size.py` gives each side a process."""
    if not device.startswith("cuda"):
        return None
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() / 2**30


def matrix_peak(device: str, side: int = 2048) -> float:
    """Operations per second of a bf16 matrix product, the best of five."""
    side = 8192 if device.startswith("cuda") else side
    a = torch.randn(side, side, device=device).bfloat16()
    return 2 * side**3 / min(seconds(lambda: a @ a, device) for _ in range(6))


def copy_peak(device: str) -> float:
    """Bytes per second that a copy of a large array reads and writes, the best of five."""
    a = torch.ones(2**27, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / min(seconds(lambda: b.copy_(a), device) for _ in range(6))


def report(rows: list[dict[str, Any]], peak: tuple[float, float], arguments: argparse.Namespace) -> None:
    print(f"matrix peak {peak[0] / 1e9:.0f} GFLOP/s (bf16), copy {peak[1] / 1e9:.1f} GB/s")
    print("| case | side | median | p90 | x ours | GFLOP | share | GB | traffic | cpu | peak GiB |")
    print("|" + "---|" * 11)
    for row in rows:
        gflop = "" if row["operations"] is None else f"{row['operations'] / 1e9:.1f}"
        share = "" if row["share"] is None else f"{row['share']:.2f}"
        gigabytes = "" if row["bytes"] is None else f"{row['bytes'] / 1e9:.2f}"
        traffic = "" if row["traffic"] is None else f"{row['traffic']:.2f}"
        memory = "" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}"
        print(
            f"| {row['case']} | {row['side']} | {1000 * row['median_s']:.1f} ms | {1000 * row['p90_s']:.1f} ms "
            f"| {row['ratio']:.2f} | {gflop} | {share} | {gigabytes} | {traffic} | {row['cpu']:.2f} | {memory} |"
        )
    facts = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "matrix_peak": peak[0],
        "copy_peak": peak[1],
        "program": Path(__file__).name,
    }
    print(json.dumps({**facts, **vars(arguments), "rows": rows}))


if __name__ == "__main__":
    main()
