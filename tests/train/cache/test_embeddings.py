"""Prompt embeddings are computed once, are what the encoder gives, and are met again only by whom they fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sana_sprint.models.text_encoder import PromptEncoder
from sana_sprint.train.cache import files as parts
from sana_sprint.train.cache.embeddings import EmbeddingCache, cached_embeddings
from tests.helpers.text import merging_tokenizer, record_runs, tiny_encoder, tiny_text_encoder

CAPTIONS = ["a red cat", "two cats", "", "a cat " * 30, "a red cat", "one more", "and a last"]
INSTRUCTION = ("Describe it:", "briefly. ")


@pytest.fixture
def encoder() -> PromptEncoder:
    return tiny_encoder()


def cached(
    folder: Path, encoder: PromptEncoder, captions: list[str] = CAPTIONS, **settings: Any
) -> EmbeddingCache:
    return cached_embeddings(folder, captions, encoder, report=lambda _: None, **settings)


def files(folder: Path) -> set[str]:
    return {path.name for path in (folder / "embeddings").iterdir()}


@pytest.mark.parametrize("instruction", [None, INSTRUCTION])
def test_embeddings_are_the_encoders(
    instruction: tuple[str, ...] | None, tmp_path: Path, encoder: PromptEncoder
) -> None:
    cache = cached(tmp_path, encoder, instruction=instruction, max_sequence_length=20)
    assert len(cache) == len(set(CAPTIONS))
    for wanted in (CAPTIONS[1:2], ["and a last", "", "two cats", "two cats"], CAPTIONS):
        found = cache.encode(wanted)
        with torch.no_grad():
            expected = encoder.encode(wanted, complex_human_instruction=instruction, max_sequence_length=20)
        assert torch.equal(found.mask, expected.mask)
        for name in ("num_tokens", "lost_tokens"):
            assert getattr(found, name) == getattr(expected, name)
        # fp32 rounding: a prompt's neighbours in its batch decide the shapes of the matrix products.
        torch.testing.assert_close(found.embeds, expected.embeds, rtol=0, atol=1e-5)
    assert any(cache.encode(CAPTIONS).lost_tokens)


def test_a_caption_that_is_not_there_is_named(tmp_path: Path, encoder: PromptEncoder) -> None:
    with pytest.raises(ValueError, match="no embedding was cached for 'another'"):
        cached(tmp_path, encoder).encode(["two cats", "another"])


def test_only_new_captions_are_encoded(
    tmp_path: Path, encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART_SIZE", 2)
    first = cached(tmp_path, encoder)
    assert len(files(tmp_path)) == 3
    runs = record_runs(encoder.text_encoder)
    again = cached(tmp_path, encoder)
    assert not runs
    assert torch.equal(first.encode(CAPTIONS).embeds, again.encode(CAPTIONS).embeds)
    cached(tmp_path, encoder, [*CAPTIONS, "a new one"])
    assert len(runs) == 1
    assert len(files(tmp_path)) == 4


def _nudged(encoder: PromptEncoder) -> PromptEncoder:
    with torch.no_grad():
        next(encoder.text_encoder.parameters()).add_(1e-3)
    return encoder


@pytest.mark.parametrize(
    "change",
    [
        lambda encoder: ({"instruction": INSTRUCTION}, encoder),
        lambda encoder: ({"max_sequence_length": 9}, encoder),
        lambda encoder: ({}, PromptEncoder(encoder.tokenizer, tiny_text_encoder().bfloat16())),
        lambda encoder: ({}, PromptEncoder(encoder.tokenizer, tiny_text_encoder(rms_norm_eps=1e-5))),
        lambda encoder: ({}, PromptEncoder(merging_tokenizer([("a", "b")]), encoder.text_encoder)),
        lambda encoder: ({}, _nudged(encoder)),
    ],
    ids=["instruction", "length", "dtype", "config", "tokenizer", "weights"],
)
def test_stale_embeddings_are_never_met(change: Any, tmp_path: Path, encoder: PromptEncoder) -> None:
    cached(tmp_path, encoder)
    # The tokenizer's own truncation and padding were set by that call, and are not its rules.
    cached(tmp_path, encoder)
    assert len(files(tmp_path)) == 1
    settings, changed = change(encoder)
    cached(tmp_path, changed, **settings)
    assert len(files(tmp_path)) == 2
