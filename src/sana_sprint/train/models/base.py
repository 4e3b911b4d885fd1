"""The interfaces of the flow models and the caption encoding that losses use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sana_sprint.models.text_encoder import PromptEmbeddings
from sana_sprint.models.transformer import CaptionContext, SanaTransformerBlock, TransformerConfig
from sana_sprint.trigflow import Velocity


class FlowModel(Protocol):
    """The methods of a transformer that losses use; `controlled.ControlledTransformer` has them too.

    The context is what that model's own encoding of captions returns.
    """

    gradient_checkpointing: bool

    @property
    def config(self) -> TransformerConfig: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def blocks(self) -> list[SanaTransformerBlock]: ...

    def __call__(
        self, hidden_states: Tensor, timestep: Tensor, context: Any, guidance: Tensor | None = None
    ) -> Tensor: ...

    def block_outputs(
        self, hidden_states: Tensor, timestep: Tensor, context: Any, guidance: Tensor | None = None
    ) -> Iterator[Tensor]: ...

    def embed_time(self, timestep: Tensor, guidance: Tensor | None = None) -> tuple[Tensor, Tensor]: ...


def velocity_of(transformer: FlowModel, context: CaptionContext, guidance: Tensor | None = None) -> Velocity:
    """The transformer as a function of noisy latents and flow time in [0,1], with these captions and guidance scales (B,)."""
    scale = transformer.config.time_scale
    return lambda x, flow_t: transformer(x, flow_t * scale, context, guidance)


class Embed(Protocol):
    """Embeddings of captions, with or without the complex human instruction in front."""

    def __call__(self, captions: Sequence[str], *, instruction: bool) -> PromptEmbeddings: ...
