"""`sana-sprint generate`: prompts to PNG files."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sana_sprint.cli import options
from sana_sprint.cli.common import UsageError, checked, console
from sana_sprint.cli.control_picture import read_control
from sana_sprint.cli.drawing import Drawn, draw, print_line, progress_bar
from sana_sprint.cli.loading import ModelOptions, load_control_pipeline, load_pipeline
from sana_sprint.cli.pictures import check_target, slug, write_picture
from sana_sprint.cli.prompts import gather_prompts

if TYPE_CHECKING:
    from sana_sprint.pipelines.text_to_image import SanaSprintPipeline
    from sana_sprint.vocabulary import Vocabulary

# 8192 x 8192, four times the largest published picture: a typing error must not fill the memory.
MAX_PIXELS = 2**26
MAX_IMAGES = 100_000  # of each prompt
SIZE_HINT = "a size is --size 512 or --size 640x480 (width x height), at most 8192x8192 pixels"
SHOWN_PROMPT = 60  # letters of a prompt in a remark


def generate(
    prompts: options.Prompts = None,
    file: options.PromptFile = None,
    model: options.Model = "emoji",
    steps: options.Steps = 2,
    num_images: options.NumImages = 1,
    seed: options.Seed = options.RANDOM_SEED,
    size: options.Size = None,
    output: options.Output = Path("out"),
    guidance: options.Guidance = None,
    max_timesteps: options.MaxTimesteps = None,
    intermediate_timesteps: options.IntermediateTimesteps = None,
    image: options.ImageFile = None,
    kind: options.Kind = None,
    thickness: options.Thickness = None,
    preview: options.Preview = None,
    scale: options.Scale = None,
    start: options.Start = None,
    end: options.End = None,
    controlnet: options.ControlNet = None,
    dtype: options.DtypeOption = options.Dtype.AUTO,
    device: options.Device = "auto",
    vae_tiling: options.VaeTiling = False,
    vae_slicing: options.VaeSlicing = False,
    lora: options.Lora = None,
    quantize: options.Quantize = "",
    fast: options.Fast = False,
    clean_caption: options.CleanCaption = False,
    as_json: options.Json = False,
) -> None:
    """Draw pictures of one or more prompts, which may follow another picture.

    Prints a line with the path and seed of each. How a picture was made is kept inside its PNG file.

    Example: sana-sprint generate "two apples on a blue background" -n 4 --seed 7 -o out/

    Example: sana-sprint generate "a red heart" --image sketch.png
    """
    task = plan(prompts, file, num_images, seed, output, as_json)
    control = read_control(
        image,
        kind=kind,
        thickness=thickness,
        preview=preview,
        scale=scale,
        start=start,
        end=end,
        controlnet=controlnet,
    )
    times = call_arguments(size, guidance, steps, max_timesteps, intermediate_timesteps, clean_caption)
    wanted = ModelOptions(model, dtype, device, vae_tiling, vae_slicing, tuple(lora or ()), quantize, fast)
    notes = {**control.notes, **wanted.notes()}

    def load() -> SanaSprintPipeline:
        return (
            load_control_pipeline(wanted, control.controlnet) if control.arguments else load_pipeline(wanted)
        )

    drawn = task.run(load, model, {**control.arguments, **times}, notes)
    control.write_preview(drawn[0], {**notes, "model": model})


@dataclass(frozen=True)
class Task:
    """A drawing command's work, checked before anything is loaded.

    texts: the prompts. jobs: prompt and seed of each picture. output, as_json: as the options of these names.
    """

    texts: list[str]
    jobs: list[tuple[str, int]]
    output: Path
    as_json: bool

    def run(
        self,
        load: Callable[[], SanaSprintPipeline],
        model: str,
        arguments: dict[str, Any],
        notes: Mapping[str, Any] | None = None,
    ) -> list[Drawn]:
        """Load the pipeline, draw with these arguments of its call, save and report; `notes` go into files and report."""
        started = time.perf_counter()
        with console().status(f"loading {model}"):
            pipeline = load()
        load_s = time.perf_counter() - started
        notes = notes or {}
        drawn, files = _draw_and_save(
            pipeline, self.jobs, arguments, model, self.output, notes, show_lines=not self.as_json
        )
        _remark(drawn, pipeline.vocabulary)
        if self.as_json:
            report = _report(
                drawn, files, self.texts, model=model, device=str(pipeline.device), load_s=load_s
            )
            typer.echo(json.dumps({**report, **notes}, ensure_ascii=False))
        return drawn


def plan(
    prompts: list[str] | None, file: Path | None, num_images: int, seed: int, output: Path, as_json: bool
) -> Task:
    """A task from a command's options of these names; raises UsageError for what cannot be done."""
    texts = gather_prompts(prompts or [], file)
    if not 1 <= num_images <= MAX_IMAGES:  # before anything of that size is made
        raise UsageError(
            f"--num-images must be from 1 to {MAX_IMAGES}, got: {num_images}", hint="leave it out for one"
        )
    repeated = [text for text in texts for _ in range(num_images)]
    check_target(output, len(repeated))
    jobs = list(zip(repeated, _seeds(seed, len(repeated)), strict=True))
    return Task(texts, jobs, output, as_json)


# ----- the options' values, checked before anything is loaded ---------------------------------------------------------


def call_arguments(
    size: str | None,
    guidance: float | None,
    steps: int,
    max_timesteps: float | None,
    intermediate_timesteps: float | None,
    clean_caption: bool,
) -> dict[str, Any]:
    """A pipeline's arguments from a command's options of these names; raises UsageError for what cannot be done."""
    return {
        **_size_arguments(size),
        **_guidance_arguments(guidance),
        **_time_arguments(steps, max_timesteps, intermediate_timesteps),
        **_caption_arguments(clean_caption),
    }


def _caption_arguments(clean: bool) -> dict[str, Any]:
    if not clean:
        return {}
    from sana_sprint.prompts import clean_caption

    clean_caption("")  # the pipeline would go on without its libraries; a command says that they are missing
    return {"clean_caption": True}


def _size_arguments(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    match = re.fullmatch(r"(\d{1,6})(?:[xX](\d{1,6}))?", text.strip())
    if match is None:
        raise UsageError(f"not a size: {text}", hint=SIZE_HINT)
    width, height = int(match[1]), int(match[2] or match[1])
    if not 0 < width * height <= MAX_PIXELS:
        raise UsageError(f"not a possible size: {width}x{height}", hint=SIZE_HINT)
    return {"width": width, "height": height}


def _guidance_arguments(scale: float | None) -> dict[str, Any]:
    if scale is None:
        return {}
    if not 0 <= scale < math.inf:
        raise UsageError(f"--guidance must be at least 0, got: {scale:g}", hint="4 to 5 are best")
    return {"guidance_scale": scale}


def _time_arguments(steps: int, first: float | None, second: float | None) -> dict[str, Any]:
    from sana_sprint.sampling import PUBLISHED_MAX, schedule

    if second is not None and steps != 2:
        raise UsageError(
            f"--intermediate-timesteps is for 2 steps, not for {steps}", hint="leave it out, or use --steps 2"
        )
    # A second time that is not given moves along with the first, should that come too near.
    times: dict[str, Any] = {"max_timesteps": PUBLISHED_MAX if first is None else first}
    if second is not None:
        times["intermediate_timesteps"] = second
    hint = "1 to 4 steps are best; times are angles between 0 (the picture) and 1.5708 (pure noise)"
    checked(lambda: schedule(steps, **times), hint=hint)
    return {"num_inference_steps": steps, **times}


def _seeds(seed: int, count: int) -> list[int]:
    from sana_sprint.noise import image_seeds, system_seed

    wanted = system_seed() if seed == options.RANDOM_SEED else seed
    seeds: list[int] = checked(lambda: image_seeds(wanted, count), hint="leave --seed out for a random one")
    return seeds


# ----- the pictures ---------------------------------------------------------------------------------------------------


def _draw_and_save(
    pipeline: SanaSprintPipeline,
    jobs: Sequence[tuple[str, int]],
    arguments: dict[str, Any],
    model: str,
    output: Path,
    notes: Mapping[str, Any],
    *,
    show_lines: bool,
) -> tuple[list[Drawn], list[Path]]:
    drawn, files = [], []
    with progress_bar() as bar:
        task = bar.add_task("drawing", total=len(jobs) * arguments["num_inference_steps"])
        for picture in draw(pipeline, jobs, arguments, on_progress=lambda count: bar.advance(task, count)):
            name = f"{slug(picture.prompt)}-{picture.seed}"
            file = write_picture(picture.image, output, name, {**picture.settings(model), **notes})
            drawn.append(picture)
            files.append(file)
            if show_lines:
                print_line(bar, f"{file}\tseed {picture.seed}")
    return drawn, files


def _remark(drawn: Sequence[Drawn], vocabulary: Vocabulary | None) -> None:
    """Report on stderr where the result differs from the request."""
    for prompt, lost in {picture.prompt: picture.lost_tokens for picture in drawn}.items():
        if lost:
            typer.echo(
                f"warning: too long, the last {lost} tokens were not used: {prompt[:SHOWN_PROMPT]}...",
                err=True,
            )
        untaught = vocabulary.untaught(prompt) if vocabulary is not None else ()
        if untaught:
            typer.echo(f"note: not taught: {', '.join(untaught)}", err=True)
    out = drawn[0].output
    if (out.width, out.height) != (out.model_width, out.model_height):
        typer.echo(
            f"note: drawn at {out.model_width}x{out.model_height}, then resized to {out.width}x{out.height}",
            err=True,
        )


def _report(
    drawn: Sequence[Drawn], files: Sequence[Path], texts: list[str], *, model: str, device: str, load_s: float
) -> dict[str, Any]:
    """The JSON object. `files` and `seeds` are per picture; `truncated` and, if there are several, `prompt` per prompt."""
    out = drawn[0].output
    draw_s = sum(picture.seconds for picture in drawn)
    return {
        "files": [str(file) for file in files],
        "seeds": [picture.seed for picture in drawn],
        "prompt": texts[0] if len(texts) == 1 else texts,
        "truncated": [picture.lost_tokens > 0 for picture in drawn[:: len(drawn) // len(texts)]],
        "model": model,
        "steps": out.num_inference_steps,
        "times": list(out.times),
        "guidance": None if out.guidance is None else out.guidance[0],
        "size": {"width": out.width, "height": out.height},
        "model_size": {"width": out.model_width, "height": out.model_height},
        "dtype": out.dtype,
        "device": device,
        "timings": {
            "load_s": round(load_s, 3),
            "draw_s": round(draw_s, 3),
            "per_picture_s": round(draw_s / len(drawn), 3),
        },
    }
