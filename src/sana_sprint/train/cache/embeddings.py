"""Embeddings of all captions by a frozen text encoder, computed once and kept on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sana_sprint.models.text_encoder import PromptEmbeddings, PromptEncoder
from sana_sprint.prompts import DEFAULT_MAX_SEQUENCE_LENGTH
from sana_sprint.train.cache.files import cut, digest, make_parts, read_part, write_part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = "embeddings 1"  # part of every key; changes with what the files hold
_CAPTIONS_AT_ONCE = 32


class EmbeddingCache:
    """Looks embeddings up instead of computing them. They stay on disk, mapped into memory."""

    def __init__(self, places: dict[str, tuple[Tensor, int]], device: torch.device) -> None:
        """Args: each caption's embeddings (L,D) and how many of its tokens were cut off; where `encode` puts them."""
        self._places = places
        self._device = device

    def __len__(self) -> int:
        return len(self._places)

    def encode(self, captions: Sequence[str]) -> PromptEmbeddings:
        """Looks up the embeddings of these captions, on the encoder's device; equal to its own up to the rounding of another batch.

        Raises:
            ValueError: one is not in the cache.
        """
        if missing := [caption for caption in captions if caption not in self._places]:
            raise ValueError(f"no embedding was cached for {missing[0]!r}")
        rows = [self._places[caption] for caption in captions]
        embeds = nn.utils.rnn.pad_sequence([tokens for tokens, _ in rows], batch_first=True)
        num_tokens = tuple(len(tokens) for tokens, _ in rows)
        return PromptEmbeddings(
            embeds=embeds.to(self._device),
            mask=(torch.arange(embeds.shape[1]) < torch.tensor(num_tokens)[:, None]).to(self._device),
            lost_tokens=tuple(lost for _, lost in rows),
        )


def cached_embeddings(
    folder: Path,
    captions: Iterable[str],
    encoder: PromptEncoder,
    *,
    instruction: Sequence[str] | None = None,
    max_sequence_length: int = DEFAULT_MAX_SEQUENCE_LENGTH,
    report: Callable[[str], None],
) -> EmbeddingCache:
    """Embeddings of captions, each different one once.

    One takes up to max_sequence_length x D numbers, with Gemma 2 2B in bf16 half a megabyte for 100 tokens.

    Args:
        folder: receives `embeddings/`, a file for every 512 captions, named by a hash of the captions, the
            instruction, the length, the tokenizer, and the encoder's weights, config and dtype. Files that are there are
            not made again. Several processes share the work.
        captions: in any order, with repetitions.
        encoder: in eval mode; its dtype is the embeddings'.
        instruction: lines put before every caption; None for none.
        max_sequence_length: embeddings for a caption at most.
        report: receives a line about the result.
    """
    texts = list(dict.fromkeys(captions))
    paths = embedding_files(
        folder, texts, encoder, instruction=instruction, max_sequence_length=max_sequence_length
    )
    files = dict(zip(cut(len(texts)), paths, strict=True))

    def make(part: range) -> Path:
        path = files[part]
        if not path.is_file():
            tensors = _encode(encoder, texts[part.start : part.stop], instruction, max_sequence_length)
            write_part(path, tensors, {})
        return path

    rows: list[tuple[Tensor, int]] = []
    for path in make_parts(len(texts), make, label="embeddings").values():
        tensors, _ = read_part(path)
        lengths = tensors["num_tokens"].tolist()
        rows += zip(torch.split(tensors["embeds"], lengths), tensors["lost_tokens"].tolist(), strict=True)
    report(f"embeddings: {len(texts)} captions in {folder / 'embeddings'}")
    return EmbeddingCache(dict(zip(texts, rows, strict=True)), encoder.text_encoder.device)


def embedding_files(
    folder: Path,
    captions: Iterable[str],
    encoder: PromptEncoder,
    *,
    instruction: Sequence[str] | None = None,
    max_sequence_length: int = DEFAULT_MAX_SEQUENCE_LENGTH,
) -> list[Path]:
    """The files that `cached_embeddings` with these arguments reads, whether they are there or not."""
    texts = list(dict.fromkeys(captions))
    settings = digest(
        _FORMAT,
        encoder.text_encoder.config.to_json_string(),
        encoder.text_encoder,
        _tokenizer_rules(encoder.tokenizer),
        json.dumps(instruction),
        max_sequence_length,
    )
    chosen = [json.dumps(texts[part.start : part.stop]) for part in cut(len(texts))]
    return [folder / "embeddings" / f"{digest(settings, each)[:32]}.safetensors" for each in chosen]


def _encode(
    encoder: PromptEncoder,
    captions: Sequence[str],
    instruction: Sequence[str] | None,
    max_sequence_length: int,
) -> dict[str, Tensor]:
    """Tokens of all captions in a row (sum of lengths, D), and each caption's length and loss."""
    tokens: list[Tensor] = []
    num_tokens: list[int] = []
    lost_tokens: list[int] = []
    for start in range(0, len(captions), _CAPTIONS_AT_ONCE):
        with torch.no_grad():
            made = encoder.encode(
                captions[start : start + _CAPTIONS_AT_ONCE],
                max_sequence_length=max_sequence_length,
                complex_human_instruction=instruction,
            )
        tokens.append(made.embeds[made.mask].cpu())
        num_tokens += made.num_tokens
        lost_tokens += made.lost_tokens
    return {
        "embeds": torch.cat(tokens),
        "num_tokens": torch.tensor(num_tokens),
        "lost_tokens": torch.tensor(lost_tokens),
    }


def _tokenizer_rules(tokenizer: PreTrainedTokenizerBase) -> str:
    """Everything that decides a text's tokens; not the truncation and padding, which change from call to call."""
    backend: Any = tokenizer.backend_tokenizer
    rules = json.loads(backend.to_str())
    return json.dumps([{**rules, "truncation": None, "padding": None}, tokenizer.truncation_side])
