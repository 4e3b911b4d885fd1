"""A transformer with its control branch as one `FlowModel`, and the source of conditions."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sana_sprint import controls
from sana_sprint.images import to_pil
from sana_sprint.models.controlnet import ControlContext, SanaControlNetModel
from sana_sprint.models.transformer import (
    CaptionContext,
    Control,
    SanaTransformer2DModel,
    SanaTransformerBlock,
    TransformerConfig,
)
from sana_sprint.train.data.pictures import fit_bucket
from sana_sprint.train.data.readers.base import Sample, Unreadable
from sana_sprint.train.data.source import Source

# (picture uint8 (H,W,3), its position in the set) -> the condition it is to be drawn from, of the same shape and type
MakeCondition = Callable[[np.ndarray, int], np.ndarray]


@dataclass(frozen=True)
class ControlledContext(CaptionContext):
    """The context of a controlled transformer: captions, and the context of its branch."""

    control: ControlContext

    @classmethod
    def of(cls, captions: CaptionContext, control: ControlContext) -> ControlledContext:
        return cls(captions.keys, captions.values, captions.bias, control)

    def index(self, rows: Tensor) -> ControlledContext:
        """The entries at `rows`."""
        return self.of(super().index(rows), self.control.index(rows))


class ControlledTransformer:
    """A `FlowModel` of a transformer and its control branch. Not a module: which of the two learns is the stage's choice."""

    def __init__(self, transformer: SanaTransformer2DModel, controlnet: SanaControlNetModel) -> None:
        controlnet.check_transformer(transformer)
        self.transformer = transformer
        self.controlnet = controlnet

    @property
    def config(self) -> TransformerConfig:
        return self.transformer.config

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def blocks(self) -> list[SanaTransformerBlock]:
        return [*self.transformer.blocks, *self.controlnet.blocks]

    @property
    def gradient_checkpointing(self) -> bool:
        return self.transformer.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self.transformer.gradient_checkpointing = self.controlnet.gradient_checkpointing = on

    def embed_time(self, timestep: Tensor, guidance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As the transformer's."""
        return self.transformer.embed_time(timestep, guidance)

    def encode(self, condition: Tensor, text: Tensor, text_mask: Tensor | None = None) -> ControlledContext:
        """Control latents (B,C,H,W) and captions, as `SanaTransformer2DModel.encode_caption` takes them."""
        return ControlledContext.of(
            self.transformer.encode_caption(text, text_mask),
            self.controlnet.encode(self.transformer, condition, text, text_mask),
        )

    def __call__(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        context: ControlledContext,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """As the transformer's, steered."""
        velocity: Tensor = self.transformer(
            hidden_states,
            timestep,
            context,
            guidance,
            self._steer(hidden_states, timestep, context, guidance),
        )
        return velocity

    def block_outputs(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        context: ControlledContext,
        guidance: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """As the transformer's, steered."""
        control = self._steer(hidden_states, timestep, context, guidance)
        return self.transformer.block_outputs(hidden_states, timestep, context, guidance, control)

    def own_time(self, timestep: Tensor) -> Tensor:
        """The branch's time, from the transformer's."""
        return timestep * (self.controlnet.config.time_scale / self.config.time_scale)

    def _steer(
        self, hidden_states: Tensor, timestep: Tensor, context: ControlledContext, guidance: Tensor | None
    ) -> Control:
        return self.controlnet.steer(hidden_states, self.own_time(timestep), context.control, guidance)


class ConditionSource:
    """A source whose pictures are the conditions of another's, so that both can be encoded and cached alike.

    Pictures are fitted first: a line keeps its width, and a branch sees in use what it saw in training.

    Args:
        source: of the pictures.
        name: a kind of `sana_sprint.controls`, or "module:function" of a `MakeCondition`.
        size, multiple: of the aspect buckets that pictures are fitted to, see `data.pictures.fit_bucket`.

    Raises:
        ValueError: the function cannot be found, or the kind is unknown.
    """

    def __init__(self, source: Source, name: str, *, size: int | None = None, multiple: int = 1) -> None:
        self.source = source
        self.kind = name
        self.make = _function(name) if ":" in name else _of_kind(name)
        self.size, self.multiple = size, multiple

    @property
    def is_concurrent(self) -> bool:
        return self.source.is_concurrent and ":" not in self.kind

    @property
    def training(self) -> Sequence[int]:
        return self.source.training

    def __call__(self, index: int) -> Sample:
        pixels, captions = self.source(index)
        return self._fitted(pixels, index), captions

    def sample(self, position: int) -> Sample:
        pixels, captions = self.source.sample(position)
        return self._fitted(pixels, position), captions

    def name(self, position: int) -> str:
        return self.source.name(position)

    def digest(self, positions: Sequence[int]) -> str:
        """Of the source's samples and of how conditions are made of the first of them that can be read."""
        digest = hashlib.sha256(f"{self.source.digest(positions)} {self.kind} {self.size}".encode())
        for position in positions:
            try:
                digest.update(self.sample(position)[0].tobytes())
                break
            except Unreadable:
                continue
        return digest.hexdigest()

    def condition(self, pixels: np.ndarray, position: int) -> np.ndarray:
        """The condition of a fitted picture. Raises ValueError if the function makes something else of it."""
        condition = np.asarray(self.make(pixels, position))
        if condition.shape != pixels.shape or condition.dtype != np.uint8:
            raise ValueError(
                f"the condition {self.kind} is {condition.dtype} of shape {condition.shape} for a picture of shape "
                f"{pixels.shape}; it must be uint8 and of the same shape"
            )
        return condition

    def _fitted(self, pixels: np.ndarray, position: int) -> np.ndarray:
        return self.condition(fit_bucket(pixels, self.size, self.multiple), position)


def _function(name: str) -> MakeCondition:
    module, _, function = name.partition(":")
    try:
        found: MakeCondition = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot find the function {name!r} that makes conditions: {error}") from error
    return found


def _of_kind(kind: str) -> MakeCondition:
    controls.check_kind(kind)

    def make(pixels: np.ndarray, position: int) -> np.ndarray:
        height, width = pixels.shape[:2]
        try:
            condition = controls.control_picture(Image.fromarray(pixels), kind, height, width)
        except controls.BlankPictureError:  # an even picture has no lines, and a branch may see that
            return np.zeros_like(pixels)
        return np.asarray(to_pil(condition)[0])

    return make
