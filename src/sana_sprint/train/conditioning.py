"""Captions to what the transformer attends to, with gradients, and with the unconditional case.

The text encoder is causal and bos stands first, so bos looks the same whatever follows it. Hiding every token
but bos therefore is the empty prompt, exactly, and needs no pass of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sana_sprint.models.text_encoder import PromptEmbeddings, PromptEncoder
from sana_sprint.models.transformer import CaptionContext, SanaTransformer2DModel
from sana_sprint.prompts import COMPLEX_HUMAN_INSTRUCTION


def embed(encoder: PromptEncoder, captions: Sequence[str], *, instruction: bool) -> PromptEmbeddings:
    """Embeddings of captions, with or without the complex human instruction in front."""
    return encoder.encode(
        captions, complex_human_instruction=COMPLEX_HUMAN_INSTRUCTION if instruction else None
    )


def drop_captions(mask: Tensor, dropped: Tensor) -> Tensor:
    """Mask (B,L) in which the rows marked by `dropped` (B,) keep their bos only."""
    kept = mask & ~dropped[:, None]
    kept[:, 0] = True
    return kept


def unconditional(transformer: SanaTransformer2DModel, embeddings: PromptEmbeddings) -> CaptionContext:
    """The empty prompt's context, one row for each of the embeddings' rows."""
    return transformer.encode_caption(embeddings.embeds[:, :1])
