"""The control branch: copies of a transformer's first blocks that see a picture to follow, such as a sketch.

What the copies make of it passes zero-initialised projections and is added to the transformer's tokens between its blocks:
an untrained branch changes nothing. Two published forms (`ControlNetConfig.topology`), with copies 0 to n-1:

    diffusers: the branch has its own embedders and starts where the transformer does; residual i is added after block
        i+1. Its folders are those of the published `SanaControlNetModel`.
    official: the branch starts from the tokens after the transformer's block 0, whose embedders, modulation and projected
        caption serve it too; residual i is added after block i (NVlabs/Sana, after PixArt-delta).

Axes: B batch, C latent channels, H W token grid, N = H*W image tokens, L text tokens, D width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from torch import Tensor, nn

from .blocks import CaptionContext, SanaBlocks, TransformerConfig
from .layers import product_dtype
from .transformer import Control, SanaTransformer2DModel

TOPOLOGIES = ("diffusers", "official")
NUM_COPIES = 7  # published, of 20 and of 28 blocks
_PROJECTIONS = ("input_block.", "controlnet_blocks.")
# What the published config.json has no fields for: left out of ours where it says nothing new, so that diffusers reads it.
_EXTENSIONS = {"qk_norm", "guidance_embeds", "guidance_embeds_scale", "timestep_scale", "topology"}


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig(TransformerConfig):
    """The transformer's fields, of which `num_layers` counts the copies, and the branch's `topology`."""

    num_layers: int = NUM_COPIES
    topology: str = "diffusers"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topology not in TOPOLOGIES:
            raise ValueError(f"topology is {self.topology!r}; allowed are {TOPOLOGIES}")

    def to_dict(self) -> dict[str, Any]:
        """Fields for config.json: the published ones, and of the others those that are not at their default."""
        usual = {field.name: field.default for field in fields(self)}
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in _EXTENSIONS or value != usual[name]
        }


@dataclass(frozen=True)
class ControlContext:
    """What the branch is told, computed once for all steps: captions, and what a picture to follow adds (B,N,D)."""

    captions: CaptionContext
    condition: Tensor

    def index(self, rows: Tensor) -> ControlContext:
        """The entries at `rows` (integers, any number, repetitions allowed)."""
        return ControlContext(self.captions.index(rows), self.condition[rows])


class SanaControlNetModel(SanaBlocks):
    """Says what to add to a transformer's tokens so that its picture follows another one.

        context = controlnet.encode(transformer, control_latent, text, text_mask)  # once
        control = controlnet.steer(latent, timestep, context, guidance)  # in each step
        velocity = transformer(latent, timestep, captions, guidance, control)

    `gradient_checkpointing` True recomputes each block in the backward pass instead of keeping its activations.
    """

    config: ControlNetConfig
    config_class = ControlNetConfig
    published_class_name = "SanaControlNetModel"

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config, has_embedders=config.topology == "diffusers")
        self.input_block = _zero_linear(config.width)
        self.controlnet_blocks = nn.ModuleList(_zero_linear(config.width) for _ in range(config.num_layers))

    @classmethod
    def from_transformer(
        cls, transformer: SanaTransformer2DModel, num_layers: int = NUM_COPIES, topology: str = "diffusers"
    ) -> Self:
        """A branch that changes nothing yet: copies of the first blocks, and of the embedders where it has its own.

        Raises ValueError unless `num_layers` is from 1 to one less than the transformer has, and for an unknown topology.
        """
        values = {**transformer.config.to_dict(), "num_layers": num_layers, "topology": topology}
        _check_depth(num_layers, transformer)
        model = cls(ControlNetConfig(**values)).to(transformer.device, transformer.dtype)
        weights = transformer.state_dict()
        model.load_state_dict(
            {
                key: own if key.startswith(_PROJECTIONS) else weights[key]
                for key, own in model.state_dict().items()
            }
        )
        return model.train(transformer.training)

    def encode(
        self,
        transformer: SanaTransformer2DModel,
        control_latent: Tensor,
        text: Tensor,
        text_mask: Tensor | None = None,
    ) -> ControlContext:
        """What the steps need of a picture to follow and of the captions.

        control_latent: the picture's latent (B,in_channels,H,W), scaled to unit variance as the noisy ones are.
        text, text_mask: as for the transformer's `encode_caption`, batch B.
        Raises ValueError for shapes that do not fit, and for a transformer that this branch is not for.
        """
        self.check_transformer(transformer)
        return ControlContext(
            self.encode_control_caption(transformer, text, text_mask),
            self.encode_condition(transformer, control_latent),
        )

    def encode_control_caption(
        self, transformer: SanaTransformer2DModel, text: Tensor, text_mask: Tensor | None = None
    ) -> CaptionContext:
        """The captions' part of `encode`: the copies have attention weights, hence keys and values, of their own."""
        return self._encode_caption(self._embedders(transformer), text, text_mask)

    def encode_condition(self, transformer: SanaTransformer2DModel, control_latent: Tensor) -> Tensor:
        """The picture's part of `encode`: what is added to the branch's first tokens, (B,N,D)."""
        channels, patch, shape = self.config.in_channels, self.config.patch_size, tuple(control_latent.shape)
        if len(shape) != 4 or shape[1] != channels or shape[2] % patch or shape[3] % patch:
            raise ValueError(
                f"control_latent has shape {shape}; expected (batch, {channels}, height, width), "
                f"sides multiples of patch_size {patch}"
            )
        tokens = self._embedders(transformer).patch_embed(control_latent)
        return _project(self.input_block, tokens)

    def steer(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        context: ControlContext,
        guidance: Tensor | None = None,
        scale: float = 1.0,
    ) -> Control:
        """The `control` of a transformer's forward on the same noisy latent, time and guidance; `scale` weakens it.

        An official branch is told these by the transformer's own tokens and modulation. One without guidance embedding
        has no use for guidance.
        Raises ValueError for another batch or size than the context's.
        """
        grid = self.grid(hidden_states)
        expected = (hidden_states.shape[0], grid[0] * grid[1], self.config.width)
        if context.condition.shape != expected:
            raise ValueError(
                f"the control context is for tokens {tuple(context.condition.shape)}; this latent has {expected}"
            )
        if self.config.topology == "official":
            return lambda x, modulation: self(x, modulation, context, grid, scale)
        own = self.embed_time(timestep, guidance if self.config.guidance_embeds else None)[0]
        tokens = self.patch_embed(hidden_states)
        return lambda x, modulation: self(tokens, own, context, grid, scale)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        context: ControlContext,
        grid: tuple[int, int],
        scale: float = 1.0,
    ) -> dict[int, Tensor]:
        """The transformer's block -> what to add to the tokens after it, from the branch's first tokens x (B,N,D).

        modulation (B,6D); grid (H,W) with H*W = N; scale: a factor of all that is added.
        """
        first = 0 if self.config.topology == "official" else 1
        x = x + context.condition.to(x.dtype)
        residuals = {}
        for number, projection in enumerate(self.controlnet_blocks):
            x = self.run_block(number, x, modulation, context.captions, grid)
            residuals[first + number] = scale * _project(projection, x)
        return residuals

    def check_transformer(self, transformer: SanaTransformer2DModel) -> None:
        """Raise ValueError unless the branch's residuals and, if it borrows embeddings, these fit the transformer."""
        _check_depth(self.config.num_layers, transformer)
        for name in ("in_channels", "patch_size", "width", "caption_channels"):
            own, others = getattr(self.config, name), getattr(transformer.config, name)
            if own != others:
                raise ValueError(f"the controlnet's {name} is {own}; the transformer's is {others}")

    def _embedders(self, transformer: SanaTransformer2DModel) -> SanaBlocks:
        return transformer if self.config.topology == "official" else self


def _zero_linear(dim: int) -> nn.Linear:
    layer = nn.Linear(dim, dim)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _project(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.Linear)
    out: Tensor = layer(x.to(product_dtype(layer.weight)))
    return out


def _check_depth(num_layers: int, transformer: SanaTransformer2DModel) -> None:
    most = transformer.config.num_layers - 1
    if not 1 <= num_layers <= most:
        raise ValueError(
            f"a controlnet of {num_layers} blocks does not fit a transformer of {most + 1}; it may have 1 to {most}"
        )
