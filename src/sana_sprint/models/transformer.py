"""The Sana transformer: Sprint students, their teachers and plain SANA, chosen by config (SANA-Sprint, section 3).

Axes: B batch, C latent channels, H W token grid, N = H*W image tokens, L text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import QK_NORMS, CaptionContext, SanaBlocks, SanaTransformerBlock, TransformerConfig
from .layers import autocast_off, modulate

__all__ = [
    "QK_NORMS",
    "CaptionContext",
    "Control",
    "SanaTransformer2DModel",
    "SanaTransformerBlock",
    "TransformerConfig",
]

OUTPUT_NORM_EPS = 1e-6  # fixed in the published model, whatever config.norm_eps says

# (tokens (B,N,D) after the first block, modulation (B,6D)) -> number of a block -> what to add to the tokens after it
Control = Callable[[Tensor, Tensor], Mapping[int, Tensor]]


class SanaTransformer2DModel(SanaBlocks):
    """Predicts the flow velocity of a noisy latent, given flow time, caption and, if it was so trained, guidance.

    `gradient_checkpointing` True recomputes each block in the backward pass instead of keeping its activations.
    """

    config_class = TransformerConfig
    published_class_name = "SanaTransformer2DModel"

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        dim, patch = config.width, config.patch_size
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
        control: what a control branch adds between blocks, see `SanaControlNetModel.steer`.
        Raises ValueError for shapes that do not fit and for guidance missing or superfluous.
        """
        self.check_inputs(hidden_states, timestep, context, guidance)
        if self.graphs is not None and control is None:
            out: Tensor | None = self.graphs(self, hidden_states, timestep, context, guidance)
            if out is not None:
                return out
        return self.evaluate(hidden_states, timestep, context, guidance, control)

    def evaluate(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        context: CaptionContext,
        guidance: Tensor | None = None,
        control: Control | None = None,
    ) -> Tensor:
        """`forward` of checked arguments, operation by operation."""
        grid = self.grid(hidden_states)
        x = self.patch_embed(hidden_states)  # (B,N,D)
        modulation, embedding = self.embed_time(timestep, guidance)
        for tokens in self._run_blocks(x, modulation, context, grid, control):
            x = tokens
        return self._to_latent(x, embedding, grid).to(hidden_states.dtype)

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
        grid = self.grid(hidden_states)
        x = self.patch_embed(hidden_states)
        modulation, _ = self.embed_time(timestep, guidance)
        yield from self._run_blocks(x, modulation, context, grid, control)

    def _run_blocks(
        self,
        x: Tensor,
        modulation: Tensor,
        context: CaptionContext,
        grid: tuple[int, int],
        control: Control | None,
    ) -> Iterator[Tensor]:
        residuals: Mapping[int, Tensor] = {}
        for number in range(self.config.num_layers):
            x = self.run_block(number, x, modulation, context, grid)
            if control is not None and number == 0:
                residuals = control(x, modulation)
            if number in residuals:
                x = x + residuals[number].to(x.dtype)
            yield x

    def _to_latent(self, x: Tensor, embedding: Tensor, grid: tuple[int, int]) -> Tensor:
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
