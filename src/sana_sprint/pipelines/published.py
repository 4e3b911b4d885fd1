"""Names of the published pipeline that need little or no code here, and those that are refused, with the reason."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sana_sprint.noise import draw_noise
from sana_sprint.notices import warn_once
from sana_sprint.pipelines.image_processor import ImageProcessor

logger = logging.getLogger(__name__)


class Refused:
    """A published name that does not exist here: reaching for it raises an AttributeError that says what to do instead."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> NoReturn:
        raise AttributeError(f"{owner.__name__} has no {self.name}: {self.reason}")


def _no_effect(name: str, reason: str) -> None:
    warn_once(logger, f"{name} has no effect: {reason}")


class PublishedMethods:
    """The rest of the published pipeline's public names."""

    transformer: Any

    if TYPE_CHECKING:

        @property
        def vae_scale_factor(self) -> int: ...
        @property
        def native_size(self) -> int: ...

    # ----- pictures and noise -----------------------------------------------------------------------------------------

    @property
    def image_processor(self) -> ImageProcessor:
        """Conversions of pictures, for code around the pipeline."""
        if self.transformer is None:
            return ImageProcessor(self.vae_scale_factor)
        multiple = self.transformer.config.patch_size * self.vae_scale_factor
        return ImageProcessor(self.vae_scale_factor, self.native_size, multiple)

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> list[Image.Image]:
        """Arrays (B,H,W,C) or (H,W,C) in [0,1] -> PIL pictures."""
        return ImageProcessor.numpy_to_pil(images)

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Initial noise (B,C,h,w) of unit variance for a call's `latents`, or `latents` itself, moved and cast.

        Raises:
            ValueError: for a list of generators of another length than `batch_size`.
        """
        if latents is not None:
            return latents.to(device, dtype)
        ratio = self.vae_scale_factor
        shape = (batch_size, num_channels_latents, height // ratio, width // ratio)
        return draw_noise(shape, generator, device=device, dtype=dtype)

    @property
    def parameters(self) -> dict[str, Any]:
        """Further arguments of the constructor, as in `Pipeline(**pipe.components, **pipe.parameters)`: there are none."""
        return {}

    # ----- settings that have no effect here --------------------------------------------------------------------------

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """No effect: SANA's self-attention is linear, it makes no matrix of tokens by tokens that could be sliced."""
        _no_effect("attention slicing", "self-attention is linear and makes no matrix that could be sliced")

    def disable_attention_slicing(self) -> None:
        """No effect, as of `enable_attention_slicing`."""
        self.enable_attention_slicing()

    def set_attention_slice(self, slice_size: int | None) -> None:
        """No effect, as of `enable_attention_slicing`."""
        self.enable_attention_slicing()

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """No effect: torch's own attention is as frugal, and self-attention is linear."""
        _no_effect("xformers attention", "torch's own is used, and self-attention is linear")

    def disable_xformers_memory_efficient_attention(self) -> None:
        """No effect, as of `enable_xformers_memory_efficient_attention`."""
        self.enable_xformers_memory_efficient_attention()

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: Any = None) -> None:
        """No effect, as of `enable_xformers_memory_efficient_attention`."""
        self.enable_xformers_memory_efficient_attention()

    # ----- names that are refused -------------------------------------------------------------------------------------

    bad_punct_regex = Refused("captions are cleaned by sana_sprint.prompts.clean_caption")
    check_inputs = Refused("a call checks its own arguments")
    prepare_extra_step_kwargs = Refused("the scheduler has no other arguments than step's own")
    register_modules = Refused("assign the component, as in pipe.vae = vae")
    register_to_config = Refused("a pipeline has no settings beside its components")
    register_for_auto_class = Refused("there are no auto classes")
    ignore_for_config = Refused("a pipeline has no settings beside its components")
    has_compatibles = Refused("there are no compatible classes")
    from_config = Refused("use from_pretrained, or the constructor with its components")
    extract_init_dict = Refused("use from_pretrained, or the constructor with its components")
    get_config_dict = Refused("sana_sprint.weights.read_model_index reads a folder's model_index.json")
    load_config = Refused("sana_sprint.weights.read_model_index reads a folder's model_index.json")
    save_config = Refused("save_pretrained writes model_index.json with the components")
    to_json_file = Refused("save_pretrained writes model_index.json with the components")
    to_json_string = Refused("save_pretrained writes model_index.json with the components")
