"""Measures single linear layers on a CPU, this package's and torchao's: `python benchmarks/torchao_layers.py`.

Both quantise the same bf16 layers of the 1.6B model. The error is that of the output, relative (root mean square) to the
fp32 layer's. Times are medians of processor time on one thread, taken in turn, so that other work on the machine counts
little. Memory is that of the weights as they are kept for computing. torchao is no dependency: `pip install torchao`.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sana_sprint.quantize.layers import QuantizedLinear

LAYERS = (
    (2240, 2240),
    (2240, 11200),
    (5600, 2240),
)  # attention, and the two products of a Mix-FFN: (inputs, outputs)
TOKENS, BATCH = 1024, 2
OURS = ("int8", "int8-weights", "int4-weights", "nf4")
THEIRS = ("int8", "int8-weights", "int4-weights", "int4-weights in bytes", "fp8", "nf4")


def main() -> None:
    """Prints one Markdown table per layer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="torchao's layers by torch.compile, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for inputs, outputs in LAYERS:
        print(f"\n{BATCH} x {TOKENS} tokens, {inputs} -> {outputs}\n")
        measure(inputs, outputs, arguments.repeats, is_compiled=arguments.compile)


@torch.inference_mode()
def measure(inputs: int, outputs: int, repeats: int, *, is_compiled: bool) -> None:
    """Prints the table of one layer."""
    torch.manual_seed(0)
    torch.compiler.reset()  # or earlier layers count against the limit of recompilations
    layer = nn.Linear(inputs, outputs, dtype=torch.bfloat16)
    nn.init.normal_(layer.weight, std=inputs**-0.5)  # distributed as trained weights are
    x = torch.randn(BATCH, TOKENS, inputs, dtype=torch.bfloat16)
    expected = nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float())
    made: dict[str, Callable[[], nn.Module]] = {"bf16": lambda: layer}
    made |= {f"{preset}, ours": lambda preset=preset: QuantizedLinear.of(layer, preset) for preset in OURS}
    made |= {f"{preset}, torchao": lambda preset=preset: torchao_layer(layer, preset) for preset in THEIRS}
    if is_compiled:
        made |= {
            f"{preset}, torchao compiled": lambda preset=preset: torch.compile(torchao_layer(layer, preset))
            for preset in THEIRS
        }
    layers: dict[str, nn.Module] = {}
    errors: dict[str, float] = {}
    for name, make in made.items():
        try:
            module = make()
            errors[name] = float((module(x).float() - expected).norm() / expected.norm())
            layers[name] = module
        except Exception as error:  # torchao refuses by exceptions of many kinds
            print(f"{name} does not run: {type(error).__name__}: {str(error).strip().splitlines()[0][:150]}")
    times: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(repeats):
        for name, module in layers.items():
            start = time.process_time()
            module(x)
            times[name].append(time.process_time() - start)
    print("| layer | time, ms | error | weights, MB |\n|---|---|---|---|")
    for name, module in layers.items():
        median = 1000 * statistics.median(times[name])
        print(f"| {name} | {median:.1f} | {errors[name]:.2%} | {weight_bytes(module) / 1e6:.1f} |")


def torchao_layer(layer: nn.Linear, preset: str) -> nn.Module:
    """A copy of the layer, quantised by torchao."""
    from torchao.prototype._nf4tensor_api import NF4WeightOnlyConfig
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int4WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
        quantize_,
    )

    nf4 = NF4WeightOnlyConfig()
    nf4.scaler_block_size = 224  # the default of 256 divides the number of scales of none of these layers
    configs: dict[str, Any] = {
        "int8": Int8DynamicActivationInt8WeightConfig,
        "int8-weights": Int8WeightOnlyConfig,
        "int4-weights": lambda: Int4WeightOnlyConfig(group_size=32),  # of 5600 inputs 64 is no divisor
        "int4-weights in bytes": lambda: IntxWeightOnlyConfig(torch.int4, PerGroup(32)),
        "fp8": Float8DynamicActivationFloat8WeightConfig,
        "nf4": lambda: nf4,
    }
    with torch.inference_mode(mode=False):
        copy = nn.Linear(layer.in_features, layer.out_features, dtype=layer.weight.dtype)
        copy.load_state_dict(layer.state_dict())
        quantize_(copy, configs[preset]())
    return copy


def weight_bytes(module: nn.Module) -> int:
    """Bytes of the tensors that a layer keeps, a tensor subclass's parts and this package's packed copy included."""
    module = getattr(module, "_orig_mod", module)
    total = 0
    for tensor in [*module.parameters(), *module.buffers()]:
        total += sum(part.numel() * part.element_size() for part in parts_of(tensor))
    if isinstance(module, QuantizedLinear) and module.preset == "int8":
        total += module.codes.numel()  # once more, as the kernel reads them
    return total


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The plain tensors inside a tensor subclass, or the tensor itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [part for each in inner for part in parts_of(each)]


if __name__ == "__main__":
    main()
