"""Feature vectors of pictures, of an Inception network or of a DC-AE's encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from sana_sprint.images import from_pil, read_picture
from sana_sprint.models.autoencoder import AutoencoderDC

INCEPTION_SIZE = 299
BATCH = 32

Extractor = Callable[
    [Tensor], Tensor
]  # pictures (B,3,H,W) fp32 in [-1,1], as `prepare` makes them -> features (B,D)


def dcae_features(autoencoder: AutoencoderDC) -> Extractor:
    """Mean and standard deviation over the grid of the encoder's deepest features, the input of its last convolution.

    D is twice the channels there: 512 for the embedded model. Distances in this space are comparable only with one another,
    not with published FIDs. Pictures must have sides divisible by the autoencoder's compression.
    """
    seen: list[Tensor] = []

    @torch.no_grad()
    def extract(images: Tensor) -> Tensor:
        hook = autoencoder.encoder.conv_out.register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0])
        )
        try:
            autoencoder.encode(images.to(autoencoder.device, autoencoder.dtype))
        finally:
            hook.remove()
        std, mean = torch.std_mean(seen.pop().float().flatten(2), dim=2)
        return torch.cat([mean, std], dim=1)

    return extract


def inception_features(weights: Path, *, device: str = "cpu") -> Extractor:
    """The 2048 pool3 features of FID's Inception network.

    Args:
        weights: the TorchScript file `inception-2015-12-05.pt` that StyleGAN's and clean-fid's scores use: it takes
            bytes (B,3,299,299) and gives features with `return_features=True`. The file is code: load it only from a trusted source.
        device: of the computation.

    Raises:
        ValueError: it is absent or cannot be read.
    """
    try:
        network = torch.jit.load(weights, map_location=device).eval()  # type: ignore[no-untyped-call]  # torch's
    except (ValueError, RuntimeError, OSError) as error:
        raise ValueError(
            f"cannot read the Inception network {weights}: {str(error).splitlines()[0]}"
        ) from error

    @torch.no_grad()
    def extract(images: Tensor) -> Tensor:
        levels = images.add(1).mul(127.5).round().to(torch.uint8)
        features: Tensor = network(levels.to(device), return_features=True)
        return features.float()

    return extract


def prepare(picture: Image.Image, size: int) -> Tensor:
    """A picture as (1,3,size,size) in [-1,1]: bicubic with a filter as wide as the shrinking, rounded to 8 bits.

    That filter matters: without it the FID of one set against itself, resized another way, is several points
    (arXiv 2104.11222). A picture that is not square is stretched, as is usual for FID.
    """
    image = from_pil(picture)
    if image.shape[2:] == (size, size):
        return image
    resized = nn.functional.interpolate(
        image, size=(size, size), mode="bicubic", align_corners=False, antialias=True
    )
    return resized.clamp(-1, 1).add(1).mul(127.5).round().div(127.5).sub(1)


def features_of(
    pictures: Sequence[Path] | Sequence[Image.Image],
    extract: Extractor,
    *,
    size: int,
    on_progress: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """Features (n,D) fp32 of pictures or picture files; `on_progress` is called with the number done since its last call.

    Raises:
        ValueError: no pictures, or a file that cannot be read, named.
    """
    if not pictures:
        raise ValueError("there are no pictures")
    parts = []
    for start in range(0, len(pictures), BATCH):
        opened = _opened(pictures[start : start + BATCH])
        images = torch.cat([prepare(picture, size) for picture in opened])
        parts.append(extract(images).cpu())
        on_progress(len(images))
    return torch.cat(parts)


def _opened(pictures: Iterable[Path | Image.Image]) -> Iterable[Image.Image]:
    for picture in pictures:
        yield picture if isinstance(picture, Image.Image) else read_picture(picture)
