"""Config, blocks and embedders of the Sana transformer: what the model and its control branch have in common.

Axes: B batch, C latent channels, H W token grid, N = H*W image tokens, L text tokens, D width, K heads, E head dim.
Attribute names are checkpoint keys of the published models, config fields those of their config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .layers import (
    CaptionProjection,
    CrossAttention,
    GatedConvFeedForward,
    GuidedTimeEmbedding,
    LinearSelfAttention,
    PatchEmbed,
    RMSNorm,
    TimeEmbedding,
    modulate,
    product_dtype,
    wide_dtype,
)

CAPTION_NORM_EPS = 1e-5
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


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Fields of the published config.json, with its defaults (the plain 1.6B SANA).

    `timestep_scale` is for callers, see `time_scale`; the network itself does not use it.
    Raises ValueError for sizes that do not fit together.
    """

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
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number from 1 up")
        if self.qk_norm not in QK_NORMS:
            raise ValueError(f"qk_norm is {self.qk_norm!r}; allowed are {QK_NORMS}")
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
        """What callers multiply flow time in [0,1] by: 1 where the time embedding is dense (SANA-Sprint, section 3.2).

        As in the published pipelines: Sprint's gives a model with guidance embedding flow time itself; the others give
        times up to 1000, multiplied by `timestep_scale`, which is 0.001 for Sprint's teachers.
        """
        return 1.0 if self.guidance_embeds else 1000 * self.timestep_scale

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Config from the contents of a config.json; keys starting with `_` are notes and dropped.

        Raises ValueError listing the keys that are not fields.
        """
        kept: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if not k.startswith("_")
        }
        unknown = sorted(kept.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown fields in the transformer config: {', '.join(unknown)}")
        return cls(**kept)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for config.json."""
        return asdict(self)


@dataclass(frozen=True)
class CaptionContext:
    """What every block needs of a batch of captions: computed once for a prompt, used in every step.

    keys, values: for each block (B,K,L,E). bias: added to attention scores, (B,1,1,L), or None if nothing is masked.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    bias: Tensor | None

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor]) -> CaptionContext:
        """What `tensors` returned."""
        half = len(tensors) // 2
        return cls(tuple(tensors[:half]), tuple(tensors[half:-1]), tensors[-1])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Keys, values and the bias, which must not be None."""
        assert self.bias is not None
        return *self.keys, *self.values, self.bias

    @property
    def batch_size(self) -> int:
        return self.keys[0].shape[0]

    def padded(self, tokens: int) -> CaptionContext:
        """Of so many tokens: what is added has weight exactly 0. The bias is never None."""
        if self.bias is not None and tokens == self.bias.shape[-1]:
            return self
        batch, _, length, _ = self.keys[0].shape
        bias = (
            self.keys[0].new_zeros(batch, 1, 1, length, dtype=torch.float32)
            if self.bias is None
            else self.bias
        )
        more = (0, 0, 0, tokens - length)
        return CaptionContext(
            keys=tuple(F.pad(key, more) for key in self.keys),
            values=tuple(F.pad(value, more) for value in self.values),
            bias=F.pad(bias, (0, tokens - length), value=float("-inf")),
        )

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


class SanaTransformerBlock(nn.Module):
    """Linear self-attention, cross-attention (neither normalised nor gated), gated convolutional feed-forward.

    `fused`, if set, is asked first: with the block and the arguments of `forward` it gives the same result faster, or
    None where it does not apply; see `sana_sprint.backends.cuda`.
    """

    fused: Callable[..., Tensor | None] | None = None

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
        if self.fused is not None:
            out = self.fused(self, x, modulation, key, value, bias, grid)
            if out is not None:
                return out
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + modulation).chunk(6, dim=1)
        low = product_dtype(self.scale_shift_table)

        x = torch.addcmul(x, gate1, self.attn1(modulate(self.norm1(x), shift1, scale1).to(low)))
        x = x + self.attn2(x.to(low), key, value, bias)
        return torch.addcmul(x, gate2, self.ff(modulate(self.norm2(x), shift2, scale2).to(low), grid))


class SanaBlocks(nn.Module):
    """Blocks and what they are told: embedded time, guidance and captions. Subclasses give the tokens their meaning.

    `gradient_checkpointing` True recomputes each block in the backward pass instead of keeping its activations.
    `graphs`, if set, are asked first, and give the same results with one launch, or None where they do not apply; see
    `sana_sprint.backends.cuda.graphs`.
    `has_embedders` False leaves the embedders out: those methods that need them are then another model's to answer.
    """

    graphs: Any = None
    patch_embed: PatchEmbed
    time_embed: TimeEmbedding | GuidedTimeEmbedding
    caption_projection: CaptionProjection
    caption_norm: RMSNorm

    def __init__(self, config: TransformerConfig, *, has_embedders: bool = True) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        dim, patch = config.width, config.patch_size
        if has_embedders:
            self.patch_embed = PatchEmbed(
                config.in_channels, dim, patch, config.sample_size // patch, config.interpolation_scale
            )
            self.time_embed = GuidedTimeEmbedding(dim) if config.guidance_embeds else TimeEmbedding(dim)
            self.caption_projection = CaptionProjection(config.caption_channels, dim)
            self.caption_norm = RMSNorm(dim, CAPTION_NORM_EPS)
        self.transformer_blocks = nn.ModuleList(
            SanaTransformerBlock(config) for _ in range(config.num_layers)
        )

    @property
    def dtype(self) -> torch.dtype:
        return self._any_weight.dtype

    @property
    def device(self) -> torch.device:
        return self._any_weight.device

    @property
    def _any_weight(self) -> Tensor:
        return self.blocks[0].scale_shift_table

    @property
    def blocks(self) -> list[SanaTransformerBlock]:
        """The transformer blocks, typed."""
        return [block for block in self.transformer_blocks if isinstance(block, SanaTransformerBlock)]

    def set_fused_attention(self, fused: bool) -> None:
        """True (default): fused cross-attention kernels. False: plain fp32 ones that `torch.func.jvp` can go through."""
        for block in self.blocks:
            block.attn2.fused = fused

    def encode_caption(self, text: Tensor, text_mask: Tensor | None = None) -> CaptionContext:
        """Project captions and compute every block's keys and values, once for all steps.

        text (B,L,caption_channels); text_mask (B,L), True or 1 = keep, None = keep all.
        """
        return self._encode_caption(self, text, text_mask)

    def _encode_caption(
        self, embedders: SanaBlocks, text: Tensor, text_mask: Tensor | None
    ) -> CaptionContext:
        """`encode_caption` of captions that the embedders of this or of another model project."""
        if text.ndim != 3 or text.shape[-1] != self.config.caption_channels:
            raise ValueError(
                f"text has shape {tuple(text.shape)}; expected (batch, tokens, {self.config.caption_channels})"
            )
        if text_mask is not None and text_mask.shape != text.shape[:2]:
            raise ValueError(
                f"text_mask has shape {tuple(text_mask.shape)}; expected {tuple(text.shape[:2])} as the text has"
            )

        def encode(text: Tensor, bias: Tensor | None) -> CaptionContext:
            projected = embedders.caption_norm(embedders.caption_projection(text.to(embedders.dtype)))
            return self._attend_to(projected, bias)

        if self.graphs is not None:
            context: CaptionContext | None = self.graphs.caption((self, embedders), encode, text, text_mask)
            if context is not None:
                return context
        if text_mask is None or bool((text_mask != 0).all()):
            return encode(text, None)
        return encode(text, attention_bias(text_mask))

    def _attend_to(self, caption: Tensor, bias: Tensor | None) -> CaptionContext:
        """Every block's keys and values of projected captions (B,L,D)."""
        caption = caption.to(product_dtype(self._any_weight))
        keys, values = zip(*(block.attn2.encode(caption) for block in self.blocks), strict=True)
        return CaptionContext(keys, values, bias)

    def embed_time(self, timestep: Tensor, guidance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Flow time (B,) in [0,1] and guidance scale (B,) as users mean it (4.5), both fp32, to vectors.

        Returns modulation (B,6D), shared by the blocks, and the embedding (B,D) it was made from.
        Raises ValueError if guidance is missing where `config.guidance_embeds` asks for it, or given where not.
        """
        if isinstance(self.time_embed, TimeEmbedding):
            if guidance is not None:
                raise ValueError(
                    "guidance was given, but this model has no guidance embedding (guidance_embeds is False)"
                )
            modulation, embedding = self.time_embed(timestep)
        else:
            if guidance is None:
                raise ValueError(
                    "guidance is missing: this model embeds it (guidance_embeds is True), e.g. 4.5 per image"
                )
            # Scaled in fp32: in bf16, 0.1 * 4.5 would already be 0.4492.
            scaled = guidance.to(wide_dtype(guidance)) * self.config.guidance_embeds_scale
            modulation, embedding = self.time_embed(timestep, scaled)
        return modulation, embedding

    def run_block(
        self,
        number: int,
        x: Tensor,
        modulation: Tensor,
        context: CaptionContext,
        grid: tuple[int, int],
    ) -> Tensor:
        """Tokens (B,N,D) after block `number`, from those before it; modulation (B,6D)."""
        block = self.transformer_blocks[number]
        inputs = (
            x,
            torch.unflatten(modulation, 1, (6, -1)),  # (B,6,D)
            context.keys[number],
            context.values[number],
            context.bias,
            grid,
        )
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)  # type: ignore[no-any-return]
        return block(*inputs)  # type: ignore[no-any-return]

    def grid(self, latent: Tensor) -> tuple[int, int]:
        """(H,W), the tokens of a latent (B,C,H*p,W*p)."""
        patch = self.config.patch_size
        return latent.shape[2] // patch, latent.shape[3] // patch


def attention_bias(text_mask: Tensor) -> Tensor:
    """(B,L) keep-mask -> additive bias (B,1,1,L) in fp32."""
    bias = torch.zeros(text_mask.shape, dtype=torch.float32, device=text_mask.device)
    return bias.masked_fill(text_mask == 0, MASKED_BIAS)[:, None, None, :]
