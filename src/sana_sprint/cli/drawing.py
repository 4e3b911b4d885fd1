"""Many pictures from one pipeline: a few per call, each reported as soon as it is there."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import typer
from rich.progress import Progress

from sana_sprint.cli.common import console
from sana_sprint.resolutions import pictures_at_once

if TYPE_CHECKING:
    from PIL import Image

    from sana_sprint.pipelines.output import SanaSprintOutput
    from sana_sprint.pipelines.text_to_image import SanaSprintPipeline

MAX_PICTURES_PER_CALL = 8  # so that the first results come before long


@dataclass(frozen=True)
class Drawn:
    """One picture, and what the call that made it said. `seconds` is its share of that call's time."""

    image: Image.Image
    prompt: str
    seed: int
    lost_tokens: int
    seconds: float
    output: SanaSprintOutput

    def settings(self, model: str) -> dict[str, Any]:
        """How to make it again, for the PNG file."""
        from sana_sprint.images import picture_settings

        output = self.output
        names = ("width", "height", "model_width", "model_height")
        return picture_settings(
            prompt=self.prompt,
            seed=self.seed,
            num_inference_steps=output.num_inference_steps,
            guidance_scale=None if output.guidance is None else output.guidance[0],
            times=output.times,
            sizes={name: getattr(output, name) for name in names},
            model=model,
            dtype=output.dtype,
        )


def draw(
    pipeline: SanaSprintPipeline,
    jobs: Sequence[tuple[str, int]],
    arguments: Mapping[str, Any],
    *,
    on_progress: Callable[[int], None] = lambda steps: None,
) -> Iterator[Drawn]:
    """Pictures of (prompt, seed) pairs, in order.

    Args:
        pipeline: draws.
        jobs: a prompt and a seed for each picture.
        arguments: of the pipeline's call, the same for all.
        on_progress: called with the number of network evaluations done since the last call, times pictures.
    """
    arguments = dict(arguments)
    if not pipeline.transformer.config.guidance_embeds:
        arguments.setdefault("guidance_scale", None)
    at_once = pictures_at_once(pipeline.native_size**2, MAX_PICTURES_PER_CALL)
    for start in range(0, len(jobs), at_once):
        part = jobs[start : start + at_once]
        prompts = list(dict.fromkeys(prompt for prompt, _ in part))
        repeats = 1
        if len(prompts) == 1:  # one row of text serves all of its pictures
            repeats = len(part)
        else:
            prompts = [prompt for prompt, _ in part]
        started = time.perf_counter()
        output: Any = pipeline(
            prompts,
            num_images_per_prompt=repeats,
            seed=[seed for _, seed in part],
            callback_on_step_end=partial(_pass_on, on_progress, len(part)),
            callback_on_step_end_tensor_inputs=(),
            **arguments,
        )
        seconds = (time.perf_counter() - started) / len(part)
        lost = [tokens for tokens in output.lost_tokens for _ in range(repeats)]
        for (prompt, seed), image, lost_tokens in zip(part, output.images, lost, strict=True):
            yield Drawn(image, prompt, seed, lost_tokens, seconds, output)


def _pass_on(on_progress: Callable[[int], None], count: int, *_: object) -> None:
    on_progress(count)


def progress_bar() -> Progress:
    """A bar on stderr that is gone when done, and is not there if stderr is no terminal."""
    terminal = console()
    return Progress(console=terminal, transient=True, redirect_stdout=False, disable=not terminal.is_terminal)


def print_line(bar: Progress, line: str) -> None:
    """A line on stdout; where that and the bar are on one terminal, the line goes above the bar."""
    if bar.console.is_terminal and sys.stdout.isatty():
        bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
    else:
        typer.echo(line)
