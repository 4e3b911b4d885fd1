"""Training a flow-matching teacher with dense time embedding and QK norm, and its text encoder with it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from sana_sprint import backends
from sana_sprint.backends.prompt_cache import CachedPromptEncoder
from sana_sprint.models.text_encoder import load_text_encoder, load_tokenizer
from sana_sprint.models.transformer import SanaTransformer2DModel, TransformerConfig
from sana_sprint.train import distributed
from sana_sprint.train.config import TeacherRun
from sana_sprint.train.models.text_encoder import make_text_encoder, train_tokenizer
from sana_sprint.train.stages.base import Report
from sana_sprint.train.stages.captions import embed
from sana_sprint.train.stages.flow import FlowStage
from sana_sprint.weights import load_model

if TYPE_CHECKING:
    from transformers import Gemma2Model, PreTrainedTokenizerBase

NUM_TOKENIZER_CAPTIONS = 20_000


class TeacherStage(FlowStage):
    """Tokenizer, text encoder and transformer: new ones, or those of the folder that the run starts from."""

    def __init__(self, config: TeacherRun, *, report: Report) -> None:
        super().__init__(config, config.autoencoder, report=report)
        tokenizer, text_encoder, transformer = (
            self._new(config) if config.start is None else _load(config.start)
        )
        self.encoder = CachedPromptEncoder(tokenizer, text_encoder)
        self.embed = partial(embed, self.encoder)
        self.transformer = backends.apply(transformer)
        self.transformer.gradient_checkpointing = config.gradient_checkpointing
        both = nn.ModuleDict({"transformer": self.transformer, "text_encoder": text_encoder})
        self.players = {"teacher": both.to(self.device)}

    def _new(self, config: TeacherRun) -> tuple[PreTrainedTokenizerBase, Gemma2Model, SanaTransformer2DModel]:
        assert config.text_encoder is not None  # as the config checks
        assert config.model is not None
        tokenizer = self._tokenizer(config)
        text_encoder = make_text_encoder(len(tokenizer), config.text_encoder)
        transformer = SanaTransformer2DModel(TransformerConfig.from_dict(config.model))
        initialise(transformer)
        return tokenizer, text_encoder, transformer

    def _tokenizer(self, config: TeacherRun) -> PreTrainedTokenizerBase:
        """Learnt by the first process, once for a run: the others, and a resumed run, read it back."""
        folder = config.output / "tokenizer"
        if distributed.rank() == 0 and not folder.is_dir():
            captions = [texts[0] for texts in self.cache.captions[:NUM_TOKENIZER_CAPTIONS]]
            train_tokenizer(captions, config.tokenizer_vocab).save_pretrained(str(folder))
        distributed.barrier()
        return load_tokenizer(folder)


def _load(folder: Path) -> tuple[PreTrainedTokenizerBase, Gemma2Model, SanaTransformer2DModel]:
    return (
        load_tokenizer(folder / "tokenizer"),
        load_text_encoder(folder / "text_encoder", dtype=torch.float32).train(),
        load_model(SanaTransformer2DModel, folder / "transformer", dtype=torch.float32).train(),
    )


def initialise(transformer: SanaTransformer2DModel) -> None:
    """DiT's start (arXiv 2212.09748, sec. 3.2): every block is the identity, the output is zero."""
    for name, parameter in transformer.named_parameters():
        if name.endswith(("to_out.0.weight", "proj_out.weight", "to_out.0.bias", "proj_out.bias")):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2 and "scale_shift_table" not in name:
            nn.init.xavier_uniform_(parameter)
    nn.init.normal_(transformer.time_embed.linear.weight, std=0.02)
