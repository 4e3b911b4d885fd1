"""Builds both pipelines on one set of random weights, in memory, for benchmarks/gpu.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from full_size import AUTOENCODER, PROMPT, TRANSFORMER, random_weights
from text_encoding import random_gemma, word_tokenizer

from sana_sprint import SanaSprintPipeline, backends
from sana_sprint.backends.cuda.graphs import CallGraphs, StepGraphs
from sana_sprint.models.autoencoder import AutoencoderConfig, AutoencoderDC
from sana_sprint.models.transformer import SanaTransformer2DModel, TransformerConfig
from sana_sprint.scheduler import SCMScheduler

TINY_TRANSFORMER = {
    **TRANSFORMER,
    "num_attention_heads": 2,
    "num_layers": 4,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 32,
    "cross_attention_dim": 64,
    "caption_channels": 64,
}
TINY_AUTOENCODER = {
    **AUTOENCODER,
    "encoder_block_out_channels": [8, 8, 8, 16, 16, 32],
    "decoder_block_out_channels": [8, 8, 8, 16, 16, 32],
    "attention_head_dim": 8,
}


@dataclass
class World:
    """Both pipelines on one set of weights, with the settings of all sections."""

    ours: SanaSprintPipeline
    theirs: Any
    device: torch.device
    size: int
    rounds: int
    batches: tuple[int, ...]
    graphs: dict[str, Any]  # component -> what records it
    out: Path
    tiny: bool

    def call(self, pipe: Any, steps: int = 1, batch: int = 1, **more: Any) -> Any:
        """The pictures (B,3,H,W) of one call, in the arguments of both pipelines."""
        extra = {} if pipe is not self.theirs or steps == 2 else {"intermediate_timesteps": None}
        with torch.no_grad():
            return pipe(
                [f"{PROMPT} {number}" for number in range(batch)],
                num_inference_steps=steps,
                height=self.size,
                width=self.size,
                generator=torch.Generator().manual_seed(0),
                use_resolution_binning=False,
                output_type="pt",
                **extra,
                **more,
            ).images

    def accelerate(self, kernels: bool, graphs: bool) -> None:
        """Switch ours. The graphs outlive being switched off."""
        self.ours.enable_fused_kernels(kernels)
        for name, recorded in self.graphs.items():
            backends.record(getattr(self.ours, name), recorded if graphs else None)

    @property
    def has_kernels(self) -> bool:
        return self.device.type == "cuda"

    def sides(self) -> dict[str, tuple[Callable[[], None], Any]]:
        """Returns name -> (function that switches accelerations, pipeline)."""
        ways = {"ours": (False, False), "ours, graphs": (False, True)}
        if self.has_kernels:
            ways |= {"ours, kernels": (True, False), "ours, kernels + graphs": (True, True)}
        ours = {name: (partial(self.accelerate, *way), self.ours) for name, way in ways.items()}
        return {**ours, "diffusers": (partial(self.accelerate, False, False), self.theirs)}


def make_world(arguments: argparse.Namespace) -> World:
    import diffusers

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fields, shape = (TINY_TRANSFORMER, TINY_AUTOENCODER) if arguments.tiny else (TRANSFORMER, AUTOENCODER)
    transformer = random_weights(lambda: SanaTransformer2DModel(TransformerConfig.from_dict(fields)), device)
    vae = random_weights(lambda: AutoencoderDC(AutoencoderConfig.from_dict(shape)), device)
    text_encoder = tiny_gemma() if arguments.tiny else random_gemma(26)
    transformer, vae, text_encoder = (model.to(device).eval() for model in (transformer, vae, text_encoder))
    tokenizer = word_tokenizer()
    ours = SanaSprintPipeline(tokenizer, text_encoder, vae, transformer, SCMScheduler())
    theirs = diffusers.SanaSprintPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=same_weights(diffusers.AutoencoderDC, shape, vae),
        transformer=same_weights(diffusers.SanaTransformer2DModel, fields, transformer),
        scheduler=diffusers.SCMScheduler(),
    )
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    return World(
        ours=ours,
        theirs=theirs,
        device=device,
        size=128 if arguments.tiny else 1024,
        rounds=2 if arguments.tiny else arguments.rounds,
        batches=(1, 2) if arguments.tiny else arguments.batches,
        graphs={"transformer": StepGraphs(64), "text_encoder": CallGraphs(64), "vae": CallGraphs(64)},
        out=arguments.out,
        tiny=arguments.tiny,
    )


def same_weights(cls: Any, fields: dict[str, Any], model: torch.nn.Module) -> Any:
    """diffusers' module on our module's tensors."""
    with torch.device("meta"):
        module = cls(**fields)
    module.load_state_dict(model.state_dict(), strict=True, assign=True)
    return module.eval().requires_grad_(False)


def tiny_gemma() -> Any:
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=2000,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        attn_implementation="eager",
    )
    return Gemma2Model(config).bfloat16()
