"""The published image processor's methods: pictures to and from tensors, arrays and PIL, and their sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sana_sprint.images import resize_to_cover, to_unit
from sana_sprint.pipelines.output import Pictures, check_output_type, convert
from sana_sprint.resolutions import nearest_bucket

PictureLike = Image.Image | np.ndarray | Tensor


@dataclass(frozen=True)
class ImageProcessor:
    """Conversions of a pipeline. Arrays are (B,H,W,C), tensors (B,C,H,W).

    vae_scale_factor: pixels per latent cell. native_size: side in pixels of the pictures that the transformer was trained on;
        None if there is no transformer. pixels_per_token: every side of its pictures is a multiple of this.
    """

    vae_scale_factor: int
    native_size: int | None = None
    pixels_per_token: int = 1

    def preprocess(
        self,
        image: PictureLike | Sequence[PictureLike],
        height: int | None = None,
        width: int | None = None,
        resize_mode: str = "default",
        crops_coords: tuple[int, int, int, int] | None = None,
    ) -> Tensor:
        """Pictures as fp32 (B,3,H,W) in [-1,1], for `vae.encode`.

        Args:
            image: a PIL picture of any mode, an array or tensor in [0,1] (with values below 0 it is taken to be in [-1,1]
                already), each with or without a batch axis; or a list of such.
            height, width: of the result, rounded down to multiples of `vae_scale_factor`; the first picture's by default.
            resize_mode: "default", which does not keep the aspect ratio; no other is supported.
            crops_coords: (left, top, right, bottom) to be cut out of PIL pictures first.

        Raises:
            ValueError: for another mode, and for pictures that are not of three channels.
        """
        if resize_mode != "default":
            raise ValueError(f"resize_mode must be 'default', got: {resize_mode!r}")
        images: list[Any] = list(image) if isinstance(image, list | tuple) else [image]
        if not images:
            raise ValueError("image must hold at least one picture, got an empty list")
        if isinstance(images[0], Image.Image):
            unit = self._from_pil(images, height, width, crops_coords)
        else:
            unit = torch.cat([_batch(each) for each in images]).float()
            size = self._size(height or unit.shape[2], width or unit.shape[3])
            unit = unit if tuple(unit.shape[2:]) == size else nn.functional.interpolate(unit, size=size)
        if unit.shape[1] != 3:
            raise ValueError(f"pictures must have 3 channels, got: {unit.shape[1]}")
        return unit if unit.min() < 0 else self.normalize(unit)

    def postprocess(
        self, image: Tensor, output_type: str = "pil", do_denormalize: Sequence[bool] | None = None
    ) -> Pictures:
        """Decoded pictures (B,3,H,W) in [-1,1] -> "pil", "np" or "pt", as a call returns them; "latent" as it is.

        `do_denormalize` says of each picture whether it is in [-1,1] (the default) or in [0,1] already.
        """
        check_output_type(output_type)
        if output_type == "latent":
            return image
        if do_denormalize is not None:
            flags = zip(image, do_denormalize, strict=True)
            image = torch.stack([each if flag else self.normalize(each.float()) for each, flag in flags])
        return convert(image, output_type)

    def classify_height_width_bin(
        self, height: int, width: int, ratios: Mapping[str, Sequence[float]] | None = None
    ) -> tuple[int, int]:
        """(height, width) of the bucket of the nearest aspect ratio: of the pipeline's model, or of a published table."""
        if ratios is not None:
            nearest = min(ratios, key=lambda ratio: abs(float(ratio) - height / width))
            return int(ratios[nearest][0]), int(ratios[nearest][1])
        if self.native_size is None:
            raise ValueError(
                "give ratios: the pipeline was made without transformer, which decides the buckets"
            )
        return nearest_bucket(height, width, self.native_size, self.pixels_per_token)

    @staticmethod
    def resize_and_crop_tensor(samples: Tensor, new_width: int, new_height: int) -> Tensor:
        """Pictures (B,C,H,W) scaled uniformly to cover the new size and cropped around their centre, fp32.

        Differences from the published method: shrinking is antialiased, and no side comes out a pixel short.
        """
        return resize_to_cover(samples, new_height, new_width)

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> list[Image.Image]:
        """Arrays (B,H,W,C) or (H,W,C) in [0,1], C 1 or 3 -> PIL pictures."""
        levels = (images * 255).round().astype(np.uint8)
        batch = levels[None] if levels.ndim == 3 else levels
        return [Image.fromarray(each[..., 0] if each.shape[-1] == 1 else each) for each in batch]

    @staticmethod
    def pil_to_numpy(images: Image.Image | Sequence[Image.Image]) -> np.ndarray:
        """PIL pictures of one size -> fp32 (B,H,W,C) in [0,1]."""
        pictures = [images] if isinstance(images, Image.Image) else list(images)
        return np.stack([np.asarray(picture, dtype=np.float32) / 255 for picture in pictures])

    @staticmethod
    def numpy_to_pt(images: np.ndarray) -> Tensor:
        """(B,H,W,C) or (B,H,W) -> (B,C,H,W)."""
        return torch.from_numpy((images[..., None] if images.ndim == 3 else images).transpose(0, 3, 1, 2))

    @staticmethod
    def pt_to_numpy(images: Tensor) -> np.ndarray:
        """(B,C,H,W) -> fp32 (B,H,W,C)."""
        array: np.ndarray = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return array

    @staticmethod
    def normalize(images: Any) -> Any:
        """An array or tensor in [0,1] -> [-1,1]."""
        return 2.0 * images - 1.0

    @staticmethod
    def denormalize(images: Tensor) -> Tensor:
        """A tensor in [-1,1] -> fp32 in [0,1], clamped."""
        return to_unit(images)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        return height - height % self.vae_scale_factor, width - width % self.vae_scale_factor

    def _from_pil(
        self,
        pictures: list[Image.Image],
        height: int | None,
        width: int | None,
        crop: tuple[int, int, int, int] | None,
    ) -> Tensor:
        if crop is not None:
            pictures = [picture.crop(crop) for picture in pictures]
        height, width = self._size(height or pictures[0].height, width or pictures[0].width)
        resized = [
            picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS) for picture in pictures
        ]
        return self.numpy_to_pt(self.pil_to_numpy(resized))


def _batch(picture: Any) -> Tensor:
    """An array or tensor of one or several pictures -> (B,C,H,W)."""
    if not isinstance(picture, np.ndarray | Tensor):
        raise ValueError(f"pictures must be PIL pictures, arrays or tensors, got: {type(picture).__name__}")
    batch = picture[None] if picture.ndim == 3 else picture
    if batch.ndim != 4:
        raise ValueError(f"pictures must have three axes, or four with a batch, got: {tuple(picture.shape)}")
    return batch if isinstance(batch, Tensor) else torch.from_numpy(batch.transpose(0, 3, 1, 2))
