"""Times fused kernels beside the plain layers, eager and under torch.compile: `python benchmarks/fused_kernels.py` on a CUDA GPU.

Shapes are those of a block of the published 1.6B transformer at 1024 px: 1024 tokens of 2240 channels, 70 heads, a gated
depthwise convolution of 11200 channels. Each operation runs over enough sets of inputs to exceed the L2 cache, all in one
CUDA graph, so that launches cost nothing on either side; the sides alternate. GB/s counts every tensor that an ideal
kernel reads and writes, once; its share is of what a large copy moves on this device. `error` is the distance from fp64.

`--sweep` also times other block sizes of the kernels that have any. `--cpu-check` runs each operation once at a tiny size
on the CPU in Triton's interpreter (set TRITON_INTERPRET=1), and times nothing.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana_sprint.models.layers import (
    LINEAR_ATTENTION_EPS,
    QK_NORM_EPS,
    GatedConvFeedForward,
    RMSNorm,
    linear_attention,
    modulate,
)

Inputs = tuple[Tensor, ...]
Action = Callable[..., Tensor]
SIDES = ("plain", "compiled", "kernel")


@dataclass(frozen=True)
class Shape:
    batch: int = 1
    side: int = 32
    width: int = 2240
    heads: int = 70
    hidden: int = 5600

    @property
    def tokens(self) -> int:
        return self.side**2


@dataclass(frozen=True)
class Operation:
    """An operation both ways; `elements` an ideal kernel reads and writes; `sweep`: other settings of the kernel."""

    name: str
    plain: Action
    kernel: Action
    inputs: Callable[[], Inputs]
    elements: int
    exact: Action
    sweep: tuple[dict[str, int], ...] = ()


def main() -> None:
    """Prints a table for each batch and one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--cpu-check", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.cpu_check:
        cpu_check()
        return
    if not torch.cuda.is_available():
        sys.exit("benchmarks/fused_kernels.py measures a CUDA GPU, and this machine has none")
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_gb_s": copy_bandwidth(),
        "operations": [],
    }
    print(f"{found['device']}, torch {torch.__version__}, copy {found['copy_gb_s']:.0f} GB/s")
    for batch in arguments.batches:
        print(
            f"\nbatch {batch}\n| operation | {' | '.join(SIDES)} us | x plain | GB/s | of copy | error, plain's |"
        )
        print("|---" * (len(SIDES) + 5) + "|")
        for operation in operations(Shape(batch=batch), torch.device("cuda")):
            row = measure(operation, batch, found["copy_gb_s"], arguments)
            found["operations"].append(row)
            print_row(row)
    text = json.dumps(found)
    if arguments.json:
        arguments.json.write_text(text, encoding="utf-8")
    print(text)


# --- The operations --------------------------------------------------------------------------------------------------


def operations(shape: Shape, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> list[Operation]:
    """The memory-bound operations of a block."""
    from sana_sprint.backends.cuda.kernels import attention, convolution, norms

    grid = (shape.side, shape.side)
    like = partial(torch.randn, device=device, dtype=dtype)

    def tokens(count: int, width: int = shape.width) -> Inputs:
        return tuple(like(shape.batch, shape.tokens, width) for _ in range(count))

    def modulation() -> Inputs:
        return like(shape.batch, 6, shape.width).unbind(1)[:2]

    q_norm, k_norm = (RMSNorm(shape.width, QK_NORM_EPS).to(device, dtype) for _ in range(2))
    feed_forward = GatedConvFeedForward(shape.width, shape.hidden / shape.width)
    feed_forward.conv_inverted = feed_forward.conv_point = nn.Identity()  # between the matrix products
    feed_forward = feed_forward.to(device, dtype).requires_grad_(False)
    exact_q, exact_k, exact_forward = (_double(module) for module in (q_norm, k_norm, feed_forward))
    conv = feed_forward.conv_depth
    size = shape.batch * shape.tokens
    return [
        Operation(
            "norm, modulation",
            lambda x, a, b: modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), a[:, None], b[:, None]),
            lambda x, a, b: norms.modulated_norm(x, a, b, 1e-6)[1],
            lambda: (*tokens(1), *modulation()),
            2 * size * shape.width,
            lambda x, a, b: modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), a[:, None], b[:, None]),
        ),
        Operation(
            "sum, norm, modulation",
            lambda x, y, a, b: modulate(F.layer_norm(x + y, x.shape[-1:], eps=1e-6), a[:, None], b[:, None]),
            lambda x, y, a, b: norms.modulated_norm(x, a, b, 1e-6, y)[1],
            lambda: (*tokens(2), *modulation()),
            4 * size * shape.width,  # the sum is also kept
            lambda x, y, a, b: modulate(F.layer_norm(x + y, x.shape[-1:], eps=1e-6), a[:, None], b[:, None]),
        ),
        Operation(
            "gate, sum",
            lambda x, y, a, _: torch.addcmul(x, a[:, None], y),
            lambda x, y, a, _: norms.gated_sum(x, a, y),
            lambda: (*tokens(2), *modulation()),
            3 * size * shape.width,
            lambda x, y, a, _: torch.addcmul(x, a[:, None], y),
        ),
        Operation(
            "rms norm",
            lambda x: q_norm(x),
            lambda x: norms.rms_norm(x, q_norm.weight, QK_NORM_EPS),
            lambda: tokens(1),
            2 * size * shape.width,
            lambda x: exact_q(x),
        ),
        Operation(
            "rms norms, linear attention",
            lambda q, k, v: linear_attention(q_norm(q), k_norm(k), v, shape.heads).to(dtype),
            lambda q, k, v, **blocks: attention.linear_attention(
                q,
                k,
                v,
                shape.heads,
                eps=LINEAR_ATTENTION_EPS,
                norms=(q_norm.weight, k_norm.weight, QK_NORM_EPS),
                **blocks,
            ),
            lambda: tokens(3),
            4 * size * shape.width,
            lambda q, k, v: linear_attention(exact_q(q), exact_k(k), v, shape.heads),
            tuple({"block_n": n} for n in (16, 32, 64, 128)),
        ),
        Operation(
            "silu, depthwise 3x3, gate",
            lambda h: feed_forward(h, grid),
            lambda h, **blocks: convolution.gated_depthwise(h, conv.weight, conv.bias, grid, **blocks),
            lambda: tokens(1, 2 * shape.hidden),
            3 * size * shape.hidden,
            lambda h: exact_forward(h, grid),
            tuple(
                {"block_c": c, "rows": r, "num_warps": n}
                for c, r, n in itertools.product((64, 128, 256), (8, 16, 32), (1, 2, 4, 8))
                if 32 * n <= c <= 64 * n
            ),
        ),
    ]


def _double(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).double().requires_grad_(False)


def cpu_check() -> None:
    shape = Shape(side=3, width=24, heads=2, hidden=6)
    for operation in operations(shape, torch.device("cpu")):
        print(f"{operation.name}: errors {errors(operation)}")


# --- Measuring -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def errors(operation: Operation) -> dict[str, float]:
    """Relative distance from fp64 of the kernel and of the plain path."""
    inputs = operation.inputs()
    exact = operation.exact(*(x.double() for x in inputs))
    sides = {"kernel": operation.kernel, "plain": operation.plain}
    return {
        name: float((side(*inputs).double() - exact).norm() / exact.norm()) for name, side in sides.items()
    }


@torch.no_grad()
def measure(
    operation: Operation, batch: int, copy_gb_s: float, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Measures microseconds of each side and the kernel's memory traffic."""
    cache = torch.cuda.get_device_properties("cuda").L2_cache_size
    first = operation.inputs()
    sets = max(2, 3 * cache // sum(x.numel() * x.element_size() for x in first) + 1)
    inputs = [first, *(operation.inputs() for _ in range(min(sets, 64) - 1))]
    sides: dict[str, Action] = {
        "plain": operation.plain,
        "compiled": torch.compile(operation.plain),
        "kernel": operation.kernel,
    }
    graphs = {name: record(side, inputs) for name, side in sides.items()}
    times = {name: 1e6 * value / len(inputs) for name, value in medians(graphs, arguments.rounds).items()}
    gb_s = 2 * operation.elements / times["kernel"] / 1e3
    row = {
        "operation": operation.name,
        "batch": batch,
        "us": times,
        "gb_s": gb_s,
        "share_of_copy": gb_s / copy_gb_s,
        "error": errors(operation),
    }
    if arguments.sweep and operation.sweep:
        row["sweep"] = sweep(operation, inputs, arguments.rounds)
    return row


def sweep(operation: Operation, inputs: list[Inputs], rounds: int) -> list[dict[str, Any]]:
    """Times the kernel with each of its settings, fastest first; microseconds."""
    rows = []
    for settings in operation.sweep:
        graph = record(partial(operation.kernel, **settings), inputs)
        seconds = medians({"kernel": graph}, max(3, rounds // 3))["kernel"]
        rows.append({**settings, "us": 1e6 * seconds / len(inputs)})
    return sorted(rows, key=lambda row: row["us"])


def record(side: Action, inputs: list[Inputs]) -> torch.cuda.CUDAGraph:
    """One pass over all sets of inputs, ready to replay."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            side(*inputs[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for values in inputs:
            side(*values)
    return graph


def medians(graphs: dict[str, torch.cuda.CUDAGraph], rounds: int) -> dict[str, float]:
    """Median seconds of a replay; the graphs take turns."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds + 2):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / 1e3)
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def copy_bandwidth(gib: int = 4) -> float:
    """GB/s that a copy inside the device reads and writes."""
    source = torch.randint(0, 255, (gib * 2**30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return 2 * source.numel() / statistics.median(seconds[3:]) / 1e9


def print_row(row: dict[str, Any]) -> None:
    us, error = row["us"], row["error"]
    cells = [row["operation"], *(f"{us[side]:.1f}" for side in SIDES), f"{us['plain'] / us['kernel']:.2f}"]
    cells += [f"{row['gb_s']:.0f}", f"{row['share_of_copy']:.0%}"]
    print(f"| {' | '.join(cells)} | {error['kernel']:.1e}, {error['plain']:.1e} |")
    for setting in row.get("sweep", [])[:3]:
        print(f"  {setting}")


if __name__ == "__main__":
    main()
