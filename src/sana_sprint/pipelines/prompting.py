"""Prompts to embeddings by a pipeline: its text encoder at work, and the published `encode_prompt`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sana_sprint.backends.prompt_cache import CachedPromptEncoder
from sana_sprint.models.text_encoder import PromptEncoder
from sana_sprint.pipelines.inputs import check_count
from sana_sprint.pipelines.text import Prompts
from sana_sprint.prompts import DEFAULT_MAX_SEQUENCE_LENGTH

PADDINGS = ("max_length", "longest")


class PromptMethods:
    """The text side of a pipeline."""

    tokenizer: Any
    text_encoder: Any
    _encoder: PromptEncoder | None

    if TYPE_CHECKING:

        @property
        def device(self) -> torch.device: ...

    @property
    def prompt_encoder(self) -> PromptEncoder | None:
        """The tokenizer and text encoder at work; None if either is missing."""
        if self.tokenizer is None or self.text_encoder is None:
            return None
        encoder = self._encoder
        if (
            encoder is None
            or encoder.tokenizer is not self.tokenizer
            or encoder.text_encoder is not self.text_encoder
        ):
            encoder = self._encoder = CachedPromptEncoder(self.tokenizer, self.text_encoder)
        return encoder

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        num_images_per_prompt: int = 1,
        device: torch.device | str | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        clean_caption: bool = False,
        max_sequence_length: int = DEFAULT_MAX_SEQUENCE_LENGTH,
        complex_human_instruction: Sequence[str] | None = None,
        lora_scale: float | None = None,
        *,
        padding: str = "max_length",
    ) -> tuple[Tensor, Tensor]:
        """Text embeddings (B,L,D) and mask (B,L) int64, 1 = a token, for the pipeline's arguments of these names.

        B is the number of prompts times `num_images_per_prompt`, each prompt's rows together, of the mask too (the published
        pipeline repeats the masks of several prompts in another order). `complex_human_instruction` is None by default, as
        published; a call puts the published instruction before its prompts unless told otherwise.

        Args:
            device: of the results; the pipeline's by default.
            lora_scale: accepted, without effect: LoRAs change the transformer only.
            padding: "max_length": L is `max_sequence_length`, and what stands at the padding is as published, so that
                embeddings of several prompts can be joined and blended. "longest": L is the longest prompt, and the padding
                of the others is 0; this runs fewer tokens. Both give the same pictures.

        Raises:
            ValueError: as the call does, and for an unknown padding.
        """
        if padding not in PADDINGS:
            raise ValueError(f"padding must be one of {', '.join(PADDINGS)}, got: {padding!r}")
        text = Prompts(prompt, prompt_embeds, prompt_attention_mask).encode(
            self.prompt_encoder,
            clean_caption=clean_caption,
            max_sequence_length=max_sequence_length,
            complex_human_instruction=complex_human_instruction,
            pad=padding == "max_length",
        )
        repeats = check_count("num_images_per_prompt", num_images_per_prompt)
        rows = text.repeat(repeats).to(self.device if device is None else device)
        return rows.embeds, rows.mask.long()
