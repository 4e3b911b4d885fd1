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
from sana_sprint.trigflow import Velocity


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


def velocity_of(
    transformer: SanaTransformer2DModel, context: CaptionContext, guidance: Tensor | None = None
) -> Velocity:
    """The transformer as a function of noisy latents and flow time in [0,1], told captions and guidance (B,).

    A model whose time is not dense has a `timestep_scale` other than 1.
    """
    scale = transformer.config.timestep_scale
    return lambda x, flow_t: transformer(x, flow_t * scale, context, guidance)
