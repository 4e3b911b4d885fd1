"""The result of a call: the pictures, and everything needed to make them again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from sana_sprint.images import to_numpy, to_pil, to_unit
from sana_sprint.resolutions import Size

Pictures = list[Image.Image] | np.ndarray | Tensor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass(eq=False)
class SanaPipelineOutput(Mapping[str, Any]):
    """The published result of a call: a mapping with the one key "images", which may be replaced, and a tuple by index.

    `output.images`, `output["images"]`, `output[0]`, `output[:1][0]` and `output.to_tuple()[0]` are the same.

    images: as in `SanaSprintOutput`.
    """

    images: Pictures

    __eq__ = object.__eq__  # a mapping's would compare pictures
    __hash__ = object.__hash__

    def to_tuple(self) -> tuple[Any, ...]:
        """The values, as a call with `return_dict=False` returns them."""
        return (self.images,)

    def __getitem__(self, key: int | str | slice) -> Any:
        if isinstance(key, int | slice):
            return self.to_tuple()[key]
        if key == "images":
            return self.images
        raise KeyError(f"an output can be indexed with 0 or 'images' only, got: {key!r}")

    def __setitem__(self, key: str, value: Pictures) -> None:
        if key != "images":
            raise KeyError(f"of an output only 'images' can be replaced, got: {key!r}")
        self.images = value

    def __iter__(self) -> Iterator[str]:
        return iter(("images",))

    def __len__(self) -> int:
        return 1


@dataclass(kw_only=True, eq=False)
class SanaSprintOutput(SanaPipelineOutput):
    """The result of a call. As a mapping and by index it is the published output; the rest are attributes.

    images: PIL pictures ("pil"); an array (B,H,W,3) in [0,1] ("np"); a tensor (B,3,H,W) in [0,1] ("pt"); or clean
        latents (B,C,h,w) of unit variance ("latent"). All images of the first prompt come first.
    seeds: one per image, each of which makes that image again by itself; None if the caller gave generators.
    times: the TrigFlow angles, from the first to 0; of an interrupted call those of the steps it made, and 0.
    guidance: guidance scale per image; None if the model has none.
    height, width: of the pictures. model_height, model_width: before resizing and cropping.
    dtype: the transformer's, such as "bfloat16".
    conditions: the control pictures as the ControlNet received them, one PIL picture per image (of several ControlNets: all
        of the first one, then those of the next); empty if drawn from text alone.
    truncated, lost_tokens: per prompt, whether its end was cut off, and the number of tokens that were.
    """

    seeds: tuple[int, ...] | None
    times: tuple[float, ...]
    guidance: tuple[float, ...] | None
    height: int
    width: int
    model_height: int
    model_width: int
    dtype: str
    lost_tokens: tuple[int, ...]
    conditions: tuple[Image.Image, ...] = ()

    @classmethod
    def of(cls, images: Pictures, size: Size, **facts: Any) -> SanaSprintOutput:
        """An output whose four sizes come from `size`."""
        return cls(images=images, **vars(size), **facts)

    @property
    def num_inference_steps(self) -> int:
        """Network evaluations per image."""
        return len(self.times) - 1

    @property
    def truncated(self) -> tuple[bool, ...]:
        """Per prompt, whether its end was cut off."""
        return tuple(lost > 0 for lost in self.lost_tokens)


def check_output_type(output_type: str) -> None:
    """Raise ValueError for an unknown one."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got: {output_type!r}")


def convert(images: Tensor, output_type: str) -> Pictures:
    """Pictures (B,3,H,W), about [-1,1] -> "pil", "np" or "pt"."""
    if output_type == "pil":
        return to_pil(images)
    return to_numpy(images) if output_type == "np" else to_unit(images)
