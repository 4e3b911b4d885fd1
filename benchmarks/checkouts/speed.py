"""Time and peak memory of two checkouts in turn: a process of each holds its model and draws when it is asked to.

A case's process: `python -m checkouts.speed CASE FOLDER`, which reads a line from stdin for each measurement and answers
with JSON.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from checkouts.environment import environment

CASES = ("transformer", "decode-512", "decode-1024", "embedded-1", "embedded-8")
TOKENS = 20


# ----- one process ----------------------------------------------------------------------------------------------------


def make(folder: Path) -> None:
    """The published transformer of 1.6B and autoencoder with random bf16 weights, in folders of their own."""
    from full_size import AUTOENCODER, TRANSFORMER, random_weights

    from sana_sprint import AutoencoderDC, SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler

    for name, cls, values in (
        ("transformer", SanaTransformer2DModel, TRANSFORMER),
        ("vae", AutoencoderDC, AUTOENCODER),
    ):
        config = cls.config_class.from_dict(values)
        component = random_weights(lambda cls=cls, config=config: cls(config))
        parts: dict[str, Any] = {
            **dict.fromkeys(("tokenizer", "text_encoder", "vae", "transformer")),
            name: component,
        }
        SanaSprintPipeline(**parts, scheduler=SCMScheduler()).save_pretrained(folder / name)


def prepare(case: str, folder: Path) -> Callable[[], object]:
    """The call that a case measures."""
    import torch

    from sana_sprint import SanaSprintPipeline

    generator = torch.Generator().manual_seed(0)
    if case.startswith("embedded"):
        pipe = SanaSprintPipeline.from_pretrained("emoji")
        pipe.set_progress_bar_config(disable=True)
        prompts = ["two apples on a blue background"] * int(case.removeprefix("embedded-"))
        return lambda: pipe(prompts, seed=7)
    if case.startswith("decode"):
        vae = SanaSprintPipeline.from_pretrained(folder / "vae").vae
        side = int(case.removeprefix("decode-")) // vae.spatial_compression_ratio
        latent = torch.randn(1, vae.config.latent_channels, side, side, generator=generator).bfloat16()
        return lambda: vae.decode(latent)
    model = SanaSprintPipeline.from_pretrained(folder / "transformer").transformer
    latent = torch.randn(1, 32, 32, 32, generator=generator).bfloat16()
    context = model.encode_caption(
        torch.randn(1, TOKENS, model.config.caption_channels, generator=generator).bfloat16()
    )
    flow_t, guidance = torch.full((1,), 0.8), torch.full((1,), 4.5)
    return lambda: model(latent, flow_t, context, guidance)


def serve(case: str, folder: Path) -> None:
    """Answers each line with a measurement: wall seconds, the share of them with the processor, and peak memory."""
    import torch

    with torch.inference_mode():
        call = prepare(case, folder)
        call()  # reads and arranges weights
        print("ready", flush=True)
        for _ in sys.stdin:
            cpu, wall = time.process_time(), time.perf_counter()
            call()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            share = cpu / wall / torch.get_num_threads()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(json.dumps({"seconds": wall, "cpu": cpu, "share": share, "peak_gib": peak}), flush=True)


# ----- two checkouts --------------------------------------------------------------------------------------------------


def compare_speed(old: Path, new: Path, rounds: int, patterns: list[str] | None, threads: int) -> None:
    """Prints a table of medians and ratios. Ratios are medians too, of neighbours in time.

    With one thread the processor's seconds mean something even where other programs take their share of it.
    """

    print(
        "| case | old s | new s | new/old | old cpu s | new cpu s | new/old | old GiB | new GiB | new/old | cpu |"
    )
    print("|" + "---|" * 11)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = [environment(checkout, threads, folder) for checkout in (old, new)]
        code = f"from pathlib import Path; from checkouts.speed import make; make(Path({str(folder)!r}))"
        subprocess.run([sys.executable, "-c", code], env=settings[0], check=True)
        for case in CASES:
            if any(fnmatch(case, pattern) for pattern in patterns or ["*"]):
                print(measure(case, folder, settings, rounds), flush=True)


def measure(case: str, folder: Path, settings: list[dict[str, str]], rounds: int) -> str:
    """A case's row of the table."""
    call = [sys.executable, "-m", "checkouts.speed", case, str(folder)]
    sides = [
        subprocess.Popen(call, env=each, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for each in settings
    ]
    found: list[list[dict[str, float]]] = [[], []]
    for side in sides:
        assert side.stdout is not None
        side.stdout.readline()
    for turn in range(rounds):
        order = (0, 1) if turn % 2 == 0 else (1, 0)  # so that a machine that slows down slows both
        for i in order:
            stdin, stdout = sides[i].stdin, sides[i].stdout
            assert stdin is not None
            assert stdout is not None
            stdin.write("go\n")
            stdin.flush()
            found[i].append(json.loads(stdout.readline()))
    for side in sides:
        side.communicate()
    peaks = [max(each["peak_gib"] for each in one) for one in found]
    share = statistics.median(each["share"] for one in found for each in one)
    return (
        f"| {case} | {_medians(found, 'seconds')} | {_medians(found, 'cpu')} "
        f"| {peaks[0]:.3f} | {peaks[1]:.3f} | {peaks[1] / peaks[0]:.3f} | {share:.2f} |"
    )


def _medians(found: list[list[dict[str, float]]], name: str) -> str:
    """Three cells: both medians, and that of the ratios with its quartiles."""
    was, now = ([each[name] for each in one] for one in found)
    ratios = [after / before for before, after in zip(was, now, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return f"{statistics.median(was):.3f} | {statistics.median(now):.3f} | {middle:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]))
