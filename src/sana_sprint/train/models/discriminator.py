"""LADD's discriminator: the frozen teacher's features, and small heads that learn (SANA-Sprint, section 3.3).

Latent adversarial diffusion distillation (arXiv 2403.12015) judges noised latents by what a diffusion model's blocks
make of them; the heads are those of StyleGAN-T (arXiv 2301.09515), one-dimensional over the tokens.
Axes: B batch, C latent channels, H W latent grid, N tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from sana_sprint.models.transformer import CaptionContext
from sana_sprint.train.models.base import FlowModel
from sana_sprint.trigflow import expand_like, trig_to_flow

VIRTUAL_BATCH = 8
_LEAK = 0.2


class Discriminator(nn.Module):
    """A head at each of the chosen blocks. Only the heads are in it: the teacher is passed to every call.

    Args:
        width: D of the teacher.
        num_blocks: how many blocks the teacher has.
        blocks: the blocks, from 0, whose outputs are judged; each once.

    Raises:
        ValueError: no block, one that the teacher does not have, or one twice.
    """

    def __init__(self, width: int, num_blocks: int, blocks: Sequence[int]) -> None:
        super().__init__()
        if not blocks or len(set(blocks)) < len(blocks) or not all(0 <= b < num_blocks for b in blocks):
            raise ValueError(
                f"discriminator.blocks is {list(blocks)}; allowed are different numbers from 0 to {num_blocks - 1}"
            )
        self.blocks = tuple(sorted(blocks))
        self.heads = nn.ModuleList(_Head(width) for _ in self.blocks)

    def features(self, teacher: FlowModel, u: Tensor, t: Tensor, context: CaptionContext) -> list[Tensor]:
        """The chosen blocks' outputs for noised latents u (B,C,H,W) at angles t (B,): (B,N,D) each.

        The teacher sees them as the flow model it is, without guidance; blocks after the last chosen one do not run.
        """
        angle = expand_like(t, u)
        outputs = teacher.block_outputs(
            u / (torch.cos(angle) + torch.sin(angle)),
            trig_to_flow(t) * teacher.config.time_scale,
            context,
        )
        numbered = zip(range(self.blocks[-1] + 1), outputs, strict=False)
        return [output for number, output in numbered if number in self.blocks]

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits of every token at every chosen block, positive for real: (B, heads*N) fp32."""
        logits = [head(tokens.transpose(1, 2)) for head, tokens in zip(self.heads, features, strict=True)]
        return torch.cat(logits, dim=1).float()


class _Head(nn.Module):
    """Tokens (B,D,N) -> logits (B,N)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = _layer(width, 1)
        self.mix = _layer(width, 9)
        self.leave = spectral_norm(nn.Conv1d(width, 1, 1), eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = (self.mix(x) + x) / math.sqrt(2)
        out: Tensor = self.leave(x)
        return out.squeeze(1)


def _layer(width: int, kernel: int) -> nn.Sequential:
    convolution = nn.Conv1d(width, width, kernel, padding=kernel // 2, padding_mode="circular")
    return nn.Sequential(
        spectral_norm(convolution, eps=1e-12), BatchNormLocal(width), nn.LeakyReLU(_LEAK, inplace=True)
    )


class BatchNormLocal(nn.Module):
    """Batch normalisation over groups of about `VIRTUAL_BATCH` samples, with statistics of the moment only.

    No running averages: real and fake batches differ, and a discriminator is never used outside training. A batch
    that is not a multiple of the group is cut into groups that differ by one sample at most.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B,D,N) -> (B,D,N), fp32 statistics over each group's samples and tokens."""
        groups = torch.tensor_split(x.float(), math.ceil(len(x) / VIRTUAL_BATCH))
        normed = torch.cat([self._normalise(group) for group in groups])
        return torch.addcmul(self.bias[:, None], normed, self.weight[:, None]).to(x.dtype)

    def _normalise(self, group: Tensor) -> Tensor:
        variance, mean = torch.var_mean(group, dim=(0, 2), correction=0, keepdim=True)
        return (group - mean) * torch.rsqrt(variance + self.eps)
