"""Encoding of captions in training: with gradients, from a cache, and without a caption.

The text encoder is causal and bos stands first, so bos looks the same whatever follows it. Hiding every token
but bos therefore is the empty prompt, exactly, and needs no pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from torch import Tensor

from sana_sprint.models.text_encoder import PromptEmbeddings, PromptEncoder
from sana_sprint.models.transformer import (
    CaptionContext,
    SanaTransformer2DModel,
)
from sana_sprint.prompts import COMPLEX_HUMAN_INSTRUCTION
from sana_sprint.train.cache.embeddings import cached_embeddings
from sana_sprint.train.config import AdaptationRun, ControlTeacherRun, StudentRun
from sana_sprint.train.models.base import Embed

FrozenTextRun = AdaptationRun | ControlTeacherRun | StudentRun  # with a frozen text encoder


def embed(encoder: PromptEncoder, captions: Sequence[str], *, instruction: bool) -> PromptEmbeddings:
    """Embeddings of captions, with or without the complex human instruction in front."""
    return encoder.encode(
        captions, complex_human_instruction=COMPLEX_HUMAN_INSTRUCTION if instruction else None
    )


def frozen_embed(
    config: FrozenTextRun,
    encoder: PromptEncoder,
    captions: Iterable[Sequence[str]],
    *,
    report: Callable[[str], None],
) -> Embed:
    """`embed` of a frozen encoder; with `cache_text`, from caches of all pictures' captions."""
    if not config.cache_text:
        return partial(embed, encoder)
    texts = [text for each in captions for text in each]
    caches = {
        kind: cached_embeddings(
            config.output.parent,
            texts,
            encoder,
            instruction=instruction,
            report=report,
        )
        for kind, instruction in instructions(config).items()
    }

    def look_up(captions: Sequence[str], *, instruction: bool) -> PromptEmbeddings:
        return caches[instruction].encode(captions)

    return look_up


def instructions(config: FrozenTextRun) -> dict[bool, Sequence[str] | None]:
    """The texts put in front of captions, with the instruction (True) and without, as far as the run uses either."""
    with_it: dict[bool, Sequence[str] | None] = (
        {True: COMPLEX_HUMAN_INSTRUCTION} if config.instruction_rate else {}
    )
    return with_it | ({False: None} if config.instruction_rate < 1 else {})


def drop_captions(mask: Tensor, dropped: Tensor) -> Tensor:
    """Mask (B,L) in which the rows marked by `dropped` (B,) keep their bos only."""
    kept = mask & ~dropped[:, None]
    kept[:, 0] = True
    return kept


def unconditional(transformer: SanaTransformer2DModel, embeddings: PromptEmbeddings) -> CaptionContext:
    """The empty prompt's context, one row for each of the embeddings' rows."""
    return transformer.encode_caption(embeddings.embeds[:, :1])
