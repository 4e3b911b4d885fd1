"""Prompts of a call, as text or as embeddings, and their encoding."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from sana_sprint import prompts
from sana_sprint.models.text_encoder import PromptEmbeddings, PromptEncoder
from sana_sprint.notices import warn_once
from sana_sprint.precision import check_finite

logger = logging.getLogger(__name__)

# Tokenizers are not thread-safe ("Already borrowed"), and pipelines may share one.
_LOCKS: WeakKeyDictionary[Any, threading.Lock] = WeakKeyDictionary()


@dataclass(frozen=True)
class Prompts:
    """A call's prompts: text, or embeddings (prompts,L,D) with their mask (prompts,L).

    Raises ValueError unless there is exactly one of the two, in these shapes.
    """

    prompt: str | Sequence[str] | None = None
    embeds: Tensor | None = None
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.embeds is None):
            given = "neither" if self.prompt is None else "both"
            raise ValueError(f"give either prompt or prompt_embeds; got {given}")
        if (self.embeds is None) != (self.mask is None):
            raise ValueError(
                "prompt_embeds and prompt_attention_mask (1 = a token) belong together; got only one of them"
            )
        if self.embeds is not None and self.mask is not None:
            _check_shapes(self.embeds, self.mask)
        else:
            _check_texts(self.texts)

    @property
    def texts(self) -> list[Any]:
        """The prompts as a list; empty if there are embeddings instead."""
        if isinstance(self.prompt, list | tuple):
            return list(self.prompt)
        return [] if self.prompt is None else [self.prompt]

    @property
    def count(self) -> int:
        """The number of prompts."""
        return len(self.texts) if self.embeds is None else self.embeds.shape[0]

    def encode(
        self,
        encoder: PromptEncoder | None,
        clean_caption: bool,
        max_sequence_length: int,
        complex_human_instruction: Sequence[str] | None,
        pad: bool = False,
    ) -> PromptEmbeddings:
        """One row per prompt. A prompt that does not fit its window is cut, counted and logged as a warning.

        With `pad`, text is encoded at its full length, see `PromptEncoder.encode`; embeddings stay as they are. Without the
        libraries of `clean_caption` text is not cleaned, as published, which is logged once.

        Raises:
            ValueError: as `PromptEncoder.encode` does, and if there is text but no encoder.
            NonFiniteError: if embeddings hold NaN or infinity.
        """
        if self.embeds is not None and self.mask is not None:
            return PromptEmbeddings(
                check_finite(self.embeds, "prompt_embeds"), self.mask != 0, lost_tokens=(0,) * self.count
            )
        if encoder is None:
            raise ValueError("this pipeline was made without text encoder or tokenizer: give prompt_embeds")
        clean_caption = clean_caption and _can_clean()
        with _LOCKS.setdefault(encoder.tokenizer, threading.Lock()):
            found = encoder.encode(
                self.texts,
                max_sequence_length=max_sequence_length,
                complex_human_instruction=complex_human_instruction,
                clean_caption=clean_caption,
                pad=pad,
            )
        for i, lost in enumerate(found.lost_tokens):
            if lost:
                logger.warning(
                    "prompt %d of %d is too long: its last %d tokens are not used", i + 1, self.count, lost
                )
        check_finite(found.embeds, "the text encoder")
        return found


def _can_clean() -> bool:
    try:
        prompts.clean_caption("")
    except ImportError as error:
        warn_once(logger, f"prompts are not cleaned: {error}")
        return False
    return True


def _check_texts(texts: list[Any]) -> None:
    if not texts:
        raise ValueError("prompt must hold at least one string, got an empty list")
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"prompt must be a string or a list of strings, got: {wrong[0]!r}")


def _check_shapes(embeds: Tensor, mask: Tensor) -> None:
    if embeds.ndim != 3 or not embeds.shape[0] or mask.shape != embeds.shape[:2]:
        raise ValueError(
            "prompt_embeds must be (prompts, tokens, channels) and prompt_attention_mask (prompts, tokens); "
            f"got: {tuple(embeds.shape)} and {tuple(mask.shape)}"
        )
