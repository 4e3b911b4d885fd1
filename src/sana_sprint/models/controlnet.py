"""The control branch: copies of a transformer's first blocks that see a picture to follow, such as a sketch.

Their outputs pass zero-initialised projections and are added to the transformer's tokens between its blocks: an untrained
branch changes nothing. Two published forms (`ControlNetConfig.topology`), with copies 0 to n-1:

    diffusers: the branch has its own embedders and starts where the transformer does; residual i is added after block
        i+1. Its folders are those of the published `SanaControlNetModel`.
    official: the branch starts from the tokens after the transformer's block 0, whose embedders, modulation and projected
        caption serve it too; residual i is added after block i (NVlabs/Sana, after PixArt-delta).

Axes: B batch, C latent channels, H W token grid, N = H*W image tokens, L text tokens, D width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from sana_sprint.config import check_choice

from .layers import CaptionProjection, RMSNorm, product_dtype
from .transformer import (
    CAPTION_NORM_EPS,
    CaptionContext,
    SanaTransformer2DModel,
    SanaTransformerBlock,
    TransformerConfig,
    attention_bias,
    check_caption,
    make_blocks,
    make_patch_embed,
    make_time_embed,
    run_block,
    typed_blocks,
)

TOPOLOGIES = ("diffusers", "official")
NUM_COPIES = 7  # published, of 20 and of 28 blocks
_PROJECTIONS = ("input_block.", "controlnet_blocks.")
# Fields that the published config.json does not have: left out of ours at their defaults, so that diffusers reads it.
_EXTENSIONS = {"qk_norm", "guidance_embeds", "guidance_embeds_scale", "timestep_scale", "topology"}


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig(TransformerConfig):
    """The transformer's fields, of which `num_layers` counts the copies, and the branch's `topology`."""

    title: ClassVar[str] = "controlnet"

    num_layers: int = NUM_COPIES
    topology: str = "diffusers"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("topology", self.topology, TOPOLOGIES)

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
    """A batch's captions and control pictures, computed once for all steps.

    captions: keys and values of the branch's own blocks. condition: the pictures' part of its first tokens, (B,N,D).
    """

    captions: CaptionContext
    condition: Tensor

    def index(self, rows: Tensor) -> ControlContext:
        """The entries at `rows` (integers, any number, repetitions allowed)."""
        return ControlContext(self.captions.index(rows), self.condition[rows])


class SanaControlNetModel(nn.Module):
    """Computes residuals for a transformer's tokens, so that its picture follows another one.

        context = controlnet.encode(transformer, control_latent, text, text_mask)  # once
        control = controlnet.steer(latent, timestep, context, guidance)  # in each step
        velocity = transformer(latent, timestep, captions, guidance, control)

    `gradient_checkpointing` True recomputes each block in the backward pass instead of keeping its activations.
    """

    config_class = ControlNetConfig
    published_class_name = "SanaControlNetModel"

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        if config.topology == "diffusers":  # the official branch uses the transformer's
            self.patch_embed = make_patch_embed(config)
            self.time_embed = make_time_embed(config)
            self.caption_projection = CaptionProjection(config.caption_channels, config.width)
            self.caption_norm = RMSNorm(config.width, CAPTION_NORM_EPS)
        self.transformer_blocks = make_blocks(config)
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
        """Encode a picture to follow and the captions, once for all steps.

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
        check_caption(self.config, text, text_mask)
        projected = self.embedders(transformer).project_caption(text)
        return CaptionContext.from_blocks(self.blocks, projected, attention_bias(text_mask))

    def encode_condition(self, transformer: SanaTransformer2DModel, control_latent: Tensor) -> Tensor:
        """The picture's part of `encode`: a term of the branch's first tokens, (B,N,D)."""
        channels, patch, shape = self.config.in_channels, self.config.patch_size, tuple(control_latent.shape)
        if len(shape) != 4 or shape[1] != channels or shape[2] % patch or shape[3] % patch:
            raise ValueError(
                f"control_latent has shape {shape}; expected (batch, {channels}, height, width), "
                f"sides multiples of patch_size {patch}"
            )
        tokens = self.embedders(transformer).patch_embed(control_latent)
        return _project(self.input_block, tokens)

    def steer(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        context: ControlContext,
        guidance: Tensor | None = None,
        scale: float = 1.0,
    ) -> ControlStep:
        """The `control` of a transformer's forward on the same noisy latent, time and guidance; `scale` weakens it.

        An official branch reads these from the transformer's own tokens and modulation. One without guidance embedding
        has no use for guidance.
        Raises ValueError for another batch or size than the context's.
        """
        step = ControlStep(self, hidden_states, timestep, context, guidance, scale)
        expected = (hidden_states.shape[0], step.grid[0] * step.grid[1], self.config.width)
        if context.condition.shape != expected:
            raise ValueError(
                f"the control context is for tokens {tuple(context.condition.shape)}; this latent has {expected}"
            )
        return step

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        context: ControlContext,
        grid: tuple[int, int],
        scale: float = 1.0,
    ) -> dict[int, Tensor]:
        """The transformer's block -> residual for the tokens after it, from the branch's first tokens x (B,N,D).

        modulation (B,6D); grid (H,W) with H*W = N; scale: a factor of all residuals.
        """
        first = 0 if self.config.topology == "official" else 1
        x = x + context.condition.to(x.dtype)
        residuals = {}
        layers = zip(self.transformer_blocks, self.controlnet_blocks, strict=True)
        for number, (block, projection) in enumerate(layers):
            x = run_block(
                block, number, x, modulation, context.captions, grid, recompute=self.gradient_checkpointing
            )
            residuals[first + number] = scale * _project(projection, x)
        return residuals

    def project_caption(self, text: Tensor) -> Tensor:
        """(B,L,caption_channels) -> (B,L,D), by the branch's own embedders."""
        projected: Tensor = self.caption_norm(self.caption_projection(text.to(self.dtype)))
        return projected

    def embed_time(self, timestep: Tensor, guidance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As the transformer's, by the branch's own embedders."""
        vectors: tuple[Tensor, Tensor] = self.time_embed(timestep, guidance)
        return vectors

    @property
    def dtype(self) -> torch.dtype:
        return self.blocks[0].scale_shift_table.dtype

    @property
    def device(self) -> torch.device:
        return self.blocks[0].scale_shift_table.device

    @property
    def blocks(self) -> list[SanaTransformerBlock]:
        """The copies of the transformer's blocks, typed."""
        return typed_blocks(self.transformer_blocks)

    def check_transformer(self, transformer: SanaTransformer2DModel) -> None:
        """Raise ValueError unless the branch's residuals and, if it borrows embeddings, these fit the transformer."""
        _check_depth(self.config.num_layers, transformer)
        for name in ("in_channels", "patch_size", "width", "caption_channels"):
            own, others = getattr(self.config, name), getattr(transformer.config, name)
            if own != others:
                raise ValueError(f"the controlnet's {name} is {own}; the transformer's is {others}")

    def embedders(self, transformer: SanaTransformer2DModel) -> SanaTransformer2DModel | SanaControlNetModel:
        """The model whose patch and caption embedders the branch uses."""
        return transformer if self.config.topology == "official" else self


@dataclass(frozen=True)
class ControlStep:
    """The residuals of one evaluation, see `SanaControlNetModel.steer`: a `Control`, computed when it is called."""

    controlnet: SanaControlNetModel
    latent: Tensor  # (B,C,H*p,W*p)
    timestep: Tensor  # (B,)
    context: ControlContext
    guidance: Tensor | None  # (B,)
    scale: float

    @property
    def grid(self) -> tuple[int, int]:
        """(H,W), the tokens of the latent."""
        patch = self.controlnet.config.patch_size
        return self.latent.shape[2] // patch, self.latent.shape[3] // patch

    def __call__(self, x: Tensor, modulation: Tensor) -> dict[int, Tensor]:
        """From the transformer's tokens (B,N,D) after its first block and its modulation (B,6D)."""
        branch = self.controlnet
        if branch.config.topology == "diffusers":
            x = branch.patch_embed(self.latent)
            guidance = self.guidance if branch.config.guidance_embeds else None
            modulation, _ = branch.embed_time(self.timestep, guidance)
        residuals: dict[int, Tensor] = branch(x, modulation, self.context, self.grid, self.scale)
        return residuals


@dataclass(frozen=True)
class ControlSum:
    """The residuals of several branches in one evaluation, added up: a `Control`."""

    steps: tuple[ControlStep, ...]

    def __call__(self, x: Tensor, modulation: Tensor) -> dict[int, Tensor]:
        total: dict[int, Tensor] = {}
        for step in self.steps:
            for number, residual in step(x, modulation).items():
                total[number] = total[number] + residual if number in total else residual
        return total


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
