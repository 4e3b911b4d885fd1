"""Several jobs of one shape drawn together: text once per prompt, one batch through the network, pictures decoded.

Cancelled jobs do not disturb the others of their batch: their pictures are dropped at the next step or decoder tile,
and work stops as soon as all of a batch's jobs are cancelled.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from cachetools import LRUCache
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sana_sprint.images import resize_to_cover, to_pil
from sana_sprint.pipelines.controlnet import SanaSprintControlNetPipeline
from sana_sprint.pipelines.latents import decode
from sana_sprint.pipelines.output import SanaSprintOutput
from sana_sprint.pipelines.text import Prompts
from sana_sprint.pipelines.text_to_image import SanaSprintPipeline
from sana_sprint.prompts import COMPLEX_HUMAN_INSTRUCTION, DEFAULT_MAX_SEQUENCE_LENGTH
from sana_sprint.resolutions import Size, pictures_at_once
from sana_sprint.sampling import PUBLISHED_GUIDANCE
from sana_sprint.serve.engine.job import ImageRequest, Job, Result
from sana_sprint.stopping import Stopped

logger = logging.getLogger(__name__)

NO_CONTROL = "this model has no ControlNet: it draws from text alone and cannot use an image"


@dataclass(frozen=True)
class Pipelines:
    """Pipelines of a loaded model: from text, and from text and a control picture if it has a ControlNet."""

    text: SanaSprintPipeline
    control: SanaSprintControlNetPipeline | None = None


@dataclass(frozen=True)
class ModelFacts:
    """Facts of a model that requests are checked against. native: side in pixels of a picture without a given size."""

    native: int
    has_guidance: bool
    has_control: bool
    dtype: str
    device: str

    @classmethod
    def of(cls, pipelines: Pipelines) -> ModelFacts:
        """Read from the loaded model."""
        pipeline = pipelines.text
        config = pipeline.transformer.config
        return cls(
            native=pipeline.native_size,
            has_guidance=config.guidance_embeds,
            has_control=pipelines.control is not None,
            dtype=str(pipeline.dtype).removeprefix("torch."),
            device=str(pipeline.device),
        )

    def check(self, request: ImageRequest) -> None:
        """Raise ValueError for a request that this model cannot honour."""
        if request.image is not None and not self.has_control:
            raise ValueError(NO_CONTROL)
        if request.guidance_scale is not None and not self.has_guidance:
            raise ValueError("guidance_scale has no effect on this model: leave it out")


def shape(request: ImageRequest, native: int | None) -> tuple[object, ...]:
    """The key of requests that can be drawn in one batch. `native`: None while the model's native side is not known."""
    size = (request.height or native, request.width or native, request.steps)
    if request.image is None:
        return size
    return (*size, request.control_kind, request.control_scale)


class PromptCache:
    """The embeddings (L,D) of the last prompts used, and how many of each prompt's tokens were cut off.

    For the engine's thread alone: cachetools' caches have no lock.
    """

    def __init__(self, size: int) -> None:
        self._known: LRUCache[str, tuple[Tensor, int]] = LRUCache(size)

    def __call__(self, pipeline: SanaSprintPipeline, prompts: Sequence[str]) -> list[tuple[Tensor, int]]:
        """One entry per prompt; those not known yet are encoded together."""
        wanted = list(dict.fromkeys(prompts))
        found = {prompt: self._known[prompt] for prompt in wanted if prompt in self._known}
        if new := [prompt for prompt in wanted if prompt not in found]:
            text = Prompts(new).encode(
                pipeline.prompt_encoder, False, DEFAULT_MAX_SEQUENCE_LENGTH, COMPLEX_HUMAN_INSTRUCTION
            )
            for prompt, row, mask, lost in zip(new, text.embeds, text.mask, text.lost_tokens, strict=True):
                found[prompt] = row[mask], lost
        if self._known.maxsize:  # a cache of size 0 refuses every entry
            self._known.update((prompt, found[prompt]) for prompt in wanted)
        return [found[prompt] for prompt in prompts]

    def clear(self) -> None:
        """Drop all, for when the model is unloaded."""
        self._known.clear()


@dataclass(frozen=True)
class _Row:
    """Picture `index` of a job: a row of the batch."""

    job: Job
    index: int

    @property
    def wanted(self) -> bool:
        return not self.job.future.cancelled()


@torch.no_grad()
def draw_jobs(
    pipelines: Pipelines, cache: PromptCache, jobs: Sequence[Job], max_batch: int
) -> tuple[dict[Job, Result], dict[str, float]]:
    """The results of those jobs that were not cancelled meanwhile, and the seconds by stage.

    Args:
        pipelines: the loaded model.
        cache: embeddings, kept from batch to batch.
        jobs: of one `shape`.
        max_batch: pictures in the network at once; more are drawn one batch after the other.

    Raises:
        Exception: whatever the pipeline raises, such as NonFiniteError; none of the jobs has a result then.
    """
    batch = _Batch(pipelines, cache)
    rows = [_Row(job, i) for job in jobs for i in range(job.request.n)]
    for start in range(0, len(rows), max_batch):
        if part := [row for row in rows[start : start + max_batch] if row.wanted]:
            batch.draw(part)
    results = {job: batch.result(job) for job in jobs if not job.future.cancelled()}
    return results, batch.seconds


class _Batch:
    """One call of `draw_jobs`, with the results so far."""

    def __init__(self, pipelines: Pipelines, cache: PromptCache) -> None:
        self.pipelines = pipelines
        self.cache = cache
        self.seconds = {"text": 0.0, "steps": 0.0, "decode": 0.0}
        self.pictures: dict[tuple[Job, int], Image.Image] = {}
        self.lost_tokens: dict[Job, int] = {}
        self.output: SanaSprintOutput | None = None  # times, sizes and dtype are the same in every part

    def draw(self, rows: list[_Row]) -> None:
        try:
            embeds, mask = self._text(rows)
            latents = self._latents(rows, embeds, mask)
            self._decode(rows, latents)
        except Stopped:
            logger.debug("nobody waits for %d pictures: not drawn", len(rows))

    def result(self, job: Job) -> Result:
        assert self.output is not None  # a job that was not cancelled has been drawn
        out, vocabulary = self.output, self.pipelines.text.vocabulary
        return Result(
            images=[self.pictures[job, i] for i in range(job.request.n)],
            seeds=job.seeds,
            times=out.times,
            sizes=_size(out),
            timings={"queue": job.queue_s, **self.seconds},
            guidance_scale=self._guidance(job),
            lost_tokens=self.lost_tokens[job],
            dtype=out.dtype,
            untaught_words=vocabulary.untaught(job.request.prompt) if vocabulary is not None else (),
        )

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - started

    def _text(self, rows: list[_Row]) -> tuple[Tensor, Tensor]:
        """Embeddings (B,L,D), zero behind a prompt's end, and mask (B,L)."""
        with self._timed("text"):
            found = self.cache(self.pipelines.text, [row.job.request.prompt for row in rows])
        self.lost_tokens |= {row.job: lost for row, (_, lost) in zip(rows, found, strict=True)}
        embeds = [row for row, _ in found]
        mask = [torch.ones(len(row), dtype=torch.bool, device=row.device) for row in embeds]
        return pad_sequence(embeds, batch_first=True), pad_sequence(mask, batch_first=True)

    def _latents(self, rows: list[_Row], embeds: Tensor, mask: Tensor) -> Tensor:
        """Clean latents (B,C,h,w)."""
        request = rows[0].job.request
        guidance = [self._guidance(row.job) for row in rows]
        pipeline, control = self._pipeline(rows)
        with self._timed("steps"):
            self.output = pipeline(
                prompt_embeds=embeds,
                prompt_attention_mask=mask,
                num_inference_steps=request.steps,
                guidance_scale=None if guidance[0] is None else guidance,
                height=request.height,
                width=request.width,
                seed=[row.job.seeds[row.index] for row in rows],
                output_type="latent",
                callback_on_step_end=lambda *_: _step_done(rows),
                callback_on_step_end_tensor_inputs=(),
                should_stop=lambda: _are_unwanted(rows),
                **control,
            )
        latents = self.output.images
        assert isinstance(latents, Tensor)  # that is what "latent" means
        return latents

    def _pipeline(self, rows: list[_Row]) -> tuple[Any, dict[str, Any]]:
        """The pipeline for these rows, and the arguments that only it has."""
        request = rows[0].job.request
        if request.image is None:
            return self.pipelines.text, {}
        if self.pipelines.control is None:
            raise ValueError(NO_CONTROL)
        return self.pipelines.control, {
            "image": [Image.fromarray(i) for row in rows if (i := row.job.request.image) is not None],
            "kind": request.control_kind,
            "controlnet_conditioning_scale": request.control_scale,
        }

    def _guidance(self, job: Job) -> float | None:
        if not self.pipelines.text.transformer.config.guidance_embeds:
            return job.request.guidance_scale  # None, or for the pipeline to refuse
        return PUBLISHED_GUIDANCE if job.request.guidance_scale is None else job.request.guidance_scale

    def _decode(self, rows: list[_Row], latents: Tensor) -> None:
        assert self.output is not None
        size, vae = _size(self.output), self.pipelines.text.vae
        at_once = pictures_at_once(size.model_pixels)  # between such groups work can stop
        kept = [i for i, row in enumerate(rows) if row.wanted]
        with self._timed("decode"):
            for start in range(0, len(kept), at_once):
                part = [i for i in kept[start : start + at_once] if rows[i].wanted]
                if not part:
                    continue
                drawn = [rows[i] for i in part]
                try:
                    pixels = decode(vae, latents[part], should_stop=partial(_are_unwanted, drawn))
                except Stopped:  # others of the batch go on
                    logger.debug("nobody waits for %d pictures: not decoded", len(drawn))
                    continue
                images = to_pil(resize_to_cover(pixels, size.height, size.width))
                self.pictures |= {
                    (row.job, row.index): image for row, image in zip(drawn, images, strict=True)
                }


def _size(output: SanaSprintOutput) -> Size:
    return Size(output.height, output.width, output.model_height, output.model_width)


def _are_unwanted(rows: Sequence[_Row]) -> bool:
    """Returns True once nobody waits for any of these rows."""
    return not any(row.wanted for row in rows)


def _step_done(rows: Sequence[_Row]) -> None:
    """Reports a step of all rows to their jobs."""
    for job in dict.fromkeys(row.job for row in rows):
        job.advance(sum(row.job is job for row in rows))
