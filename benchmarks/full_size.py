"""Times one 1024 px picture at the published 1.6B size, ours beside diffusers: `python benchmarks/full_size.py FOLDER`.

Writes a pipeline folder of the published shapes (Sprint transformer 1.6B, Gemma 2 2B, DC-AE f32c32) with random bf16
weights, 9 GB, unless FOLDER already has it. Then each side runs in processes of its own, alternating: it loads the
folder, makes a latent and decodes it, and reports the time of each stage and its peak memory. The latents must agree.

The tokenizer is a stand-in: prompts have about as many tokens as with Gemma's, but not the same ones.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PROMPT = "a tiny astronaut hatching from an egg on the moon"
STAGES = ("load", "text", "transformer", "decode", "total")
TRANSFORMER = {
    "num_attention_heads": 70,
    "attention_head_dim": 32,
    "num_layers": 20,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
    "caption_channels": 2304,
    "sample_size": 32,
    "guidance_embeds": True,
    "qk_norm": "rms_norm_across_heads",
}
AUTOENCODER = {
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}


def main() -> None:
    """Prints a table and one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=1, help="runs of each side")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--offload", action="store_true", help="ours with enable_disk_offload")
    parser.add_argument("--preset", help="ours with all three models in this preset of quantisation")
    parser.add_argument(
        "--warm", action="store_true", help="a picture of 256 px first, which reads and arranges weights"
    )
    parser.add_argument("--side", choices=("ours", "diffusers"), help="run one side here and print its JSON")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(run_side(arguments)))
        return
    if not (arguments.folder / "model_index.json").is_file():
        make_folder(arguments.folder)
    results: dict[str, list[dict[str, float]]] = {"ours": [], "diffusers": []}
    for _ in range(arguments.repeats):
        for side in results:
            results[side].append(_subprocess(side, arguments))
            print(f"{side}: {results[side][-1]}", file=sys.stderr)
    report(results, latent_difference(arguments.folder), arguments)


def make_folder(folder: Path) -> None:
    """Writes the random-weight pipeline folder, one component at a time to keep memory low."""
    from text_encoding import random_gemma, word_tokenizer

    from sana_sprint.models.autoencoder import AutoencoderConfig, AutoencoderDC
    from sana_sprint.models.transformer import SanaTransformer2DModel, TransformerConfig
    from sana_sprint.scheduler import SCMScheduler
    from sana_sprint.train.stages.student import sprint_index
    from sana_sprint.weights import save_model, write_model_index

    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    random_gemma(26).save_pretrained(str(folder / "text_encoder"))
    save_model(
        random_weights(lambda: SanaTransformer2DModel(TransformerConfig.from_dict(TRANSFORMER))),
        folder / "transformer",
    )
    save_model(
        random_weights(lambda: AutoencoderDC(AutoencoderConfig.from_dict(AUTOENCODER))), folder / "vae"
    )
    SCMScheduler().save_pretrained(folder / "scheduler")
    write_model_index(folder, sprint_index(type(tokenizer).__name__))


def random_weights(build: Callable[[], Any], device: str | torch.device = "cpu") -> Any:
    """The module in bf16: matrices and kernels of fan-in scale, norm weights 1, biases 0."""
    with torch.device("meta"):
        model = build()
    model = model.to(torch.bfloat16).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    return model


def run_side(arguments: argparse.Namespace) -> dict[str, float]:
    """Loads the folder, makes the picture, saves its latent as `<folder>/latent-<side>.pt`; seconds and GiB."""
    side, folder, steps, size = arguments.side, arguments.folder, arguments.steps, arguments.size
    clock = Stopwatch()
    if side == "ours":
        from sana_sprint import SanaSprintPipeline
    else:
        from diffusers import SanaSprintPipeline
    start = time.perf_counter()
    pipe = SanaSprintPipeline.from_pretrained(str(folder), torch_dtype=torch.bfloat16)
    clock.seconds["load"] = time.perf_counter() - start
    pipe.set_progress_bar_config(disable=True)
    if side == "ours" and arguments.preset:
        pipe.quantize(dict.fromkeys(("text_encoder", "transformer", "vae"), arguments.preset))
    if side == "ours" and arguments.offload:
        pipe.enable_disk_offload()
    # diffusers refuses the intermediate time unless there are two steps
    extra = {} if steps == 2 or side == "ours" else {"intermediate_timesteps": None}
    if arguments.warm:
        pipe(PROMPT, num_inference_steps=steps, height=256, width=256, use_resolution_binning=False, **extra)
    pipe.text_encoder.forward = clock.around("text", pipe.text_encoder.forward)
    pipe.transformer.forward = clock.around("transformer", pipe.transformer.forward)
    pipe.vae.decode = clock.around("decode", pipe.vae.decode)

    def keep_latent(_: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == steps - 1:
            torch.save(values["latents"].float(), folder / f"latent-{side}.pt")
        return values

    start = time.perf_counter()
    pipe(
        PROMPT,
        num_inference_steps=steps,
        height=size,
        width=size,
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=keep_latent,
        output_type="pt",
        **extra,
    )
    clock.seconds["total"] = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {**{name: round(clock.seconds.get(name, 0.0), 2) for name in STAGES}, "peak_gib": round(peak, 2)}


class Stopwatch:
    """Sums the seconds spent inside wrapped functions."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps the function so that its time is counted under the name."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

        return timed


def latent_difference(folder: Path) -> float:
    """Root mean square of the latents' difference over that of the reference."""
    ours, reference = (
        torch.load(folder / f"latent-{side}.pt", weights_only=True) for side in ("ours", "diffusers")
    )
    return float((ours - reference).norm() / reference.norm())


def report(
    results: dict[str, list[dict[str, float]]], difference: float, arguments: argparse.Namespace
) -> None:
    """The table of medians and ratios, then one JSON line."""
    medians = {
        side: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for side, runs in results.items()
    }
    print(
        f"{arguments.size} px, {arguments.steps} steps, {arguments.preset or 'bf16'}, {torch.get_num_threads()} threads, {platform.machine()}"
    )
    print("| stage | ours | diffusers | ratio |\n|---|---|---|---|")
    for key in (*STAGES, "peak_gib"):
        ours, theirs = medians["ours"][key], medians["diffusers"][key]
        unit = "GiB" if key == "peak_gib" else "s"
        print(f"| {key} | {ours:.2f} {unit} | {theirs:.2f} {unit} | {theirs / max(ours, 1e-9):.2f} |")
    print(f"latents: relative difference {difference:.2e}")
    print(json.dumps({"steps": arguments.steps, "size": arguments.size, "difference": difference, **medians}))


def _subprocess(side: str, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, str(arguments.folder), "--side", side]
    command += ["--steps", str(arguments.steps), "--size", str(arguments.size)]
    command += ["--offload"] if arguments.offload else []
    command += ["--warm"] if arguments.warm else []
    command += ["--preset", arguments.preset] if arguments.preset else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
