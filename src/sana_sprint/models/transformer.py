"""The Sana transformer: Sprint students, their teachers and plain SANA, chosen by config (SANA-Sprint, section 3).

From the top down: config, model, captions, blocks; the layers of a block are in `layers.py`.
Axes: B batch, C latent channels, H W token grid, N = H*W image tokens, L text tokens, D width, K heads, E head dim.
Attribute names are checkpoint keys of the published models, config fields those of their config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sana_sprint.config import Config, check_choice, check_count

from .layers import (
    CaptionProjection,
    CrossAttention,
    GatedConvFeedForward,
    GuidedTimeEmbedding,
    LinearSelfAttention,
    PatchEmbed,
    RMSNorm,
    TimeEmbedding,
    autocast_off,
    modulate,
    product_dtype,
)

CAPTION_NORM_EPS = 1e-5
OUTPUT_NORM_EPS = 1e-6  # fixed in the published model, whatever config.norm_eps says
MASKED_BIAS = -10_000.0  # the published value; a caption whose tokens are all masked attends to them evenly
QK_NORMS = (None, "rms_norm_across_heads")
_SIZES = (
    "in_channels",
    "num_attention_heads",
    "attention_head_dim",
    "num_layers",
    "num_cross_attention_heads",
    "cross_attention_head_dim",
    "cross_attention_dim",
    "caption_channels",
    "sample_size",
    "patch_size",
)

# (tokens (B,N,D) after the first block, modulation (B,6D)) -> number of a block -> residual added to the tokens after it
Control = Callable[[Tensor, Tensor], Mapping[int, Tensor]]


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Config):
    """Fields of the published config.json, with its defaults (the plain 1.6B SANA).

    `timestep_scale` is for callers, see `time_scale`; the network itself does not use it.
    Raises ValueError for sizes that do not fit together.
    """

    title: ClassVar[str] = "transformer"

    in_channels: int = 32
    out_channels: int | None = 32
    num_attention_heads: int = 70
    attention_head_dim: int = 32
    num_layers: int = 20
    num_cross_attention_heads: int = 20
    cross_attention_head_dim: int = 112
    cross_attention_dim: int = 2240
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    dropout: float = 0.0
    attention_bias: bool = False
    sample_size: int = 32
    patch_size: int = 1
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None
    guidance_embeds: bool = False
    guidance_embeds_scale: float = 0.1
    qk_norm: str | None = None
    timestep_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in _SIZES:
            check_count(name, getattr(self, name))
        check_choice("qk_norm", self.qk_norm, QK_NORMS)
        if self.cross_attention_dim != self.width:
            raise ValueError(
                f"cross_attention_dim is {self.cross_attention_dim}; it must be the width, num_attention_heads * "
                f"attention_head_dim = {self.width}, because captions are projected to that"
            )
        if self.interpolation_scale is not None and self.width % 4:
            raise ValueError(f"width is {self.width}; a position embedding needs a multiple of 4")

    @property
    def width(self) -> int:
        """D, the number of channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def time_scale(self) -> float:
        """Factor of flow time in [0,1] for the model's `timestep`: 1 where the time embedding is dense (section 3.2).

        As in the published pipelines: Sprint's gives a model with guidance embedding flow time itself; the others give
        times up to 1000, multiplied by `timestep_scale`, which is 0.001 for Sprint's teachers.
        """
        return 1.0 if self.guidance_embeds else 1000 * self.timestep_scale


class SanaTransformer2DModel(nn.Module):
    """Predicts the flow velocity of a noisy latent, given flow time, caption and, if it was so trained, guidance.

    `gradient_checkpointing` True recomputes each block in the backward pass instead of keeping its activations.
    """

    config_class = TransformerConfig
    published_class_name = "SanaTransformer2DModel"

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        dim, patch = config.width, config.patch_size
        self.patch_embed = make_patch_embed(config)
        self.time_embed = make_time_embed(config)
        self.caption_projection = CaptionProjection(config.caption_channels, dim)
        self.caption_norm = RMSNorm(dim, CAPTION_NORM_EPS)
        self.transformer_blocks = make_blocks(config)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim).div_(dim**0.5))
        self.norm_out = nn.LayerNorm(dim, eps=OUTPUT_NORM_EPS, elementwise_affine=False)
        self.proj_out = nn.Linear(dim, patch * patch * (config.out_channels or config.in_channels))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        context: CaptionContext,
        guidance: Tensor | None = None,
        control: Control | None = None,
    ) -> Tensor:
        """Flow velocity (B,out_channels,H,W), in the dtype of `hidden_states`.

        hidden_states: noisy latent (B,in_channels,H,W), H and W multiples of patch_size, about unit variance.
        timestep: flow time (B,) in [0,1], fp32. context: from `encode_caption`, batch B.
        guidance: guidance scale (B,), fp32; required exactly if `config.guidance_embeds`.
        control: residuals of a control branch, see `SanaControlNetModel.steer`.
        Raises ValueError for shapes that do not fit and for guidance missing or superfluous.
        """
        self.check_inputs(hidden_states, timestep, context, guidance)
        grid = self.grid(hidden_states)
        x = self.patch_embed(hidden_states)  # (B,N,D)
        modulation, embedding = self.embed_time(timestep, guidance)
        for tokens in self._run_blocks(x, modulation, context, grid, control):
            x = tokens
        return self.to_latent(x, embedding, grid).to(hidden_states.dtype)

    def block_outputs(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        context: CaptionContext,
        guidance: Tensor | None = None,
        control: Control | None = None,
    ) -> Iterator[Tensor]:
        """The tokens (B,N,D) after each block in turn, as features; arguments and errors are those of `forward`.

        Blocks run as they are asked for: a caller that needs only the first few pays only for those.
        """
        self.check_inputs(hidden_states, timestep, context, guidance)
        x = self.patch_embed(hidden_states)
        modulation, _ = self.embed_time(timestep, guidance)
        return self._run_blocks(x, modulation, context, self.grid(hidden_states), control)

    def encode_caption(self, text: Tensor, text_mask: Tensor | None = None) -> CaptionContext:
        """Project captions and compute every block's keys and values, once for all steps.

        text (B,L,caption_channels); text_mask (B,L), True or 1 = keep, None = keep all.
        """
        check_caption(self.config, text, text_mask)
        return CaptionContext.from_blocks(self.blocks, self.project_caption(text), attention_bias(text_mask))

    def project_caption(self, text: Tensor) -> Tensor:
        """(B,L,caption_channels) -> (B,L,D), normalised."""
        projected: Tensor = self.caption_norm(self.caption_projection(text.to(self.dtype)))
        return projected

    def embed_time(self, timestep: Tensor, guidance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Flow time (B,) in [0,1] and guidance scale (B,) as users mean it (4.5), both fp32, to vectors.

        Returns modulation (B,6D), shared by the blocks, and the embedding (B,D) it was made from.
        Raises ValueError if guidance is missing where `config.guidance_embeds` asks for it, or given where not.
        """
        vectors: tuple[Tensor, Tensor] = self.time_embed(timestep, guidance)
        return vectors

    @property
    def dtype(self) -> torch.dtype:
        return self.scale_shift_table.dtype

    @property
    def device(self) -> torch.device:
        return self.scale_shift_table.device

    @property
    def blocks(self) -> list[SanaTransformerBlock]:
        """The transformer blocks, typed."""
        return typed_blocks(self.transformer_blocks)

    def grid(self, latent: Tensor) -> tuple[int, int]:
        """(H,W), the tokens of a latent (B,C,H*p,W*p)."""
        patch = self.config.patch_size
        return latent.shape[2] // patch, latent.shape[3] // patch

    def _run_blocks(
        self,
        x: Tensor,
        modulation: Tensor,
        context: CaptionContext,
        grid: tuple[int, int],
        control: Control | None,
    ) -> Iterator[Tensor]:
        residuals: Mapping[int, Tensor] = {}
        for number, block in enumerate(self.transformer_blocks):
            x = run_block(block, number, x, modulation, context, grid, recompute=self.gradient_checkpointing)
            if control is not None and number == 0:
                residuals = control(x, modulation)
            if number in residuals:
                x = x + residuals[number].to(x.dtype)
            yield x

    def to_latent(self, x: Tensor, embedding: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B,N,D) -> latent (B,out_channels,H,W)."""
        shift, scale = (self.scale_shift_table + embedding[:, None]).chunk(2, dim=1)
        with autocast_off(x.device):  # a few channels only: full precision is free here
            x = modulate(self.norm_out(x), shift, scale)
            x = F.linear(x.to(self.dtype), self.proj_out.weight, self.proj_out.bias)
        return self.unpatchify(x, grid)

    def unpatchify(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patches (B,N,p*p*C) -> latent (B,C,H*p,W*p)."""
        patch = self.config.patch_size
        x = x.view(x.shape[0], *grid, patch, patch, -1)  # (B,H,W,p,p,C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def check_inputs(
        self, hidden_states: Tensor, timestep: Tensor, context: CaptionContext, guidance: Tensor | None
    ) -> None:
        """Raise ValueError for shapes that do not fit the model or each other."""
        channels, patch, shape = self.config.in_channels, self.config.patch_size, tuple(hidden_states.shape)
        if len(shape) != 4 or shape[1] != channels:
            raise ValueError(f"hidden_states has shape {shape}; expected (batch, {channels}, height, width)")
        if shape[2] % patch or shape[3] % patch:
            raise ValueError(
                f"the latent grid is {shape[2]} x {shape[3]}; both must be multiples of patch_size {patch}"
            )
        for name, value in (("timestep", timestep), ("guidance", guidance)):
            if value is not None and value.shape != shape[:1]:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}; expected ({shape[0]},), one number per image"
                )
        if len(context.keys) != self.config.num_layers:
            raise ValueError(
                f"context was made for a model of {len(context.keys)} blocks; this one has {self.config.num_layers}"
            )
        if context.batch_size != shape[0]:
            raise ValueError(
                f"context holds {context.batch_size} captions for {shape[0]} images; use its repeat or index"
            )


# --- Captions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaptionContext:
    """Keys and values of a batch of captions, computed once for a prompt and used in every step.

    keys, values: for each block (B,K,L,E). bias: added to attention scores, (B,1,1,L), or None if nothing is masked.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    bias: Tensor | None

    @classmethod
    def from_blocks(
        cls, blocks: Sequence[SanaTransformerBlock], caption: Tensor, bias: Tensor | None
    ) -> CaptionContext:
        """The blocks' keys and values of projected captions (B,L,D)."""
        caption = caption.to(product_dtype(blocks[0].scale_shift_table))
        keys, values = zip(*(block.attn2.encode(caption) for block in blocks), strict=True)
        return cls(keys, values, bias)

    @property
    def batch_size(self) -> int:
        return self.keys[0].shape[0]

    def index(self, rows: Tensor) -> CaptionContext:
        """The captions at `rows` (integers, any number, repetitions allowed)."""
        return CaptionContext(
            keys=tuple(key[rows] for key in self.keys),
            values=tuple(value[rows] for value in self.values),
            bias=None if self.bias is None else self.bias[rows],
        )

    def repeat(self, n: int) -> CaptionContext:
        """Each caption `n` times in a row: a, b -> a, a, b, b for n = 2."""
        device = self.keys[0].device
        return self.index(torch.arange(self.batch_size, device=device).repeat_interleave(n))


def check_caption(config: TransformerConfig, text: Tensor, text_mask: Tensor | None) -> None:
    """Raise ValueError unless text is (B,L,caption_channels) and its mask (B,L)."""
    if text.ndim != 3 or text.shape[-1] != config.caption_channels:
        raise ValueError(
            f"text has shape {tuple(text.shape)}; expected (batch, tokens, {config.caption_channels})"
        )
    if text_mask is not None and text_mask.shape != text.shape[:2]:
        raise ValueError(
            f"text_mask has shape {tuple(text_mask.shape)}; expected {tuple(text.shape[:2])} as the text has"
        )


def attention_bias(text_mask: Tensor | None) -> Tensor | None:
    """(B,L) keep-mask -> bias of attention scores (B,1,1,L) in fp32; None where nothing is masked."""
    if text_mask is None or bool((text_mask != 0).all()):
        return None
    return masked_bias(text_mask)


def masked_bias(text_mask: Tensor) -> Tensor:
    """`attention_bias` without looking at the mask's values, which a GPU would be waited for."""
    bias = torch.zeros(text_mask.shape, dtype=torch.float32, device=text_mask.device)
    return bias.masked_fill(text_mask == 0, MASKED_BIAS)[:, None, None, :]


# --- Blocks and embedders, shared with the control branch ----------------------------------------------------------


class SanaTransformerBlock(nn.Module):
    """Linear self-attention, cross-attention (neither normalised nor gated), gated convolutional feed-forward."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim, qk_norm = config.width, config.qk_norm is not None
        cross_width = config.num_cross_attention_heads * config.cross_attention_head_dim
        self.norm1 = nn.LayerNorm(dim, eps=config.norm_eps, elementwise_affine=False)
        self.attn1 = LinearSelfAttention(
            dim,
            dim,
            config.num_attention_heads,
            bias=config.attention_bias,
            qk_norm=qk_norm,
            dropout=config.dropout,
        )
        self.norm2 = nn.LayerNorm(dim, eps=config.norm_eps, elementwise_affine=config.norm_elementwise_affine)
        self.attn2 = CrossAttention(
            dim,
            cross_width,
            config.num_cross_attention_heads,
            bias=True,
            qk_norm=qk_norm,
            dropout=config.dropout,
        )
        self.ff = GatedConvFeedForward(dim, config.mlp_ratio)
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim).div_(dim**0.5))

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        grid: tuple[int, int],
    ) -> Tensor:
        """x (B,N,D); modulation (B,6,D); key, value (B,K,L,E); bias (B,1,1,L) or None; grid (H,W) -> (B,N,D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + modulation).chunk(6, dim=1)
        low = product_dtype(self.scale_shift_table)

        x = torch.addcmul(x, gate1, self.attn1(modulate(self.norm1(x), shift1, scale1).to(low)))
        x = x + self.attn2(x.to(low), key, value, bias)
        return torch.addcmul(x, gate2, self.ff(modulate(self.norm2(x), shift2, scale2).to(low), grid))


def run_block(
    block: nn.Module,
    number: int,
    x: Tensor,
    modulation: Tensor,
    context: CaptionContext,
    grid: tuple[int, int],
    *,
    recompute: bool,
) -> Tensor:
    """Tokens (B,N,D) after block `number`; modulation (B,6D). `recompute`: see `gradient_checkpointing`."""
    inputs = (
        x,
        torch.unflatten(modulation, 1, (6, -1)),  # (B,6,D)
        context.keys[number],
        context.values[number],
        context.bias,
        grid,
    )
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)  # type: ignore[no-any-return]
    return block(*inputs)  # type: ignore[no-any-return]


def make_blocks(config: TransformerConfig) -> nn.ModuleList:
    return nn.ModuleList(SanaTransformerBlock(config) for _ in range(config.num_layers))


def typed_blocks(blocks: nn.ModuleList) -> list[SanaTransformerBlock]:
    return [block for block in blocks if isinstance(block, SanaTransformerBlock)]


def make_patch_embed(config: TransformerConfig) -> PatchEmbed:
    base_size = config.sample_size // config.patch_size
    return PatchEmbed(
        config.in_channels, config.width, config.patch_size, base_size, config.interpolation_scale
    )


def make_time_embed(config: TransformerConfig) -> TimeEmbedding | GuidedTimeEmbedding:
    if config.guidance_embeds:
        return GuidedTimeEmbedding(config.width, config.guidance_embeds_scale)
    return TimeEmbedding(config.width)
