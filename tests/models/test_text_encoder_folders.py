"""Loading tokenizer and text encoder folders: what is read and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma2Model,
    LlamaConfig,
    LlamaModel,
)

from sana_sprint.backends.prompt_cache import CachedPromptEncoder
from sana_sprint.models.text_encoder import load_text_encoder, load_tokenizer
from tests.helpers.text import (
    INSTRUCTION,
    PROMPTS,
    save_tiny_text,
    tiny_encoder,
    tiny_text_encoder,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_text(tmp_path)
    return tmp_path


@torch.no_grad()
def test_load_gives_back_what_was_saved(folder):
    loaded = CachedPromptEncoder(
        load_tokenizer(folder / "tokenizer"), load_text_encoder(folder / "text_encoder")
    )
    assert not loaded.text_encoder.training
    assert loaded.text_encoder.config._attn_implementation == "eager"
    expected = tiny_encoder().encode(PROMPTS, complex_human_instruction=INSTRUCTION)
    assert torch.equal(loaded.encode(PROMPTS, complex_human_instruction=INSTRUCTION).embeds, expected.embeds)


def test_load_keeps_or_changes_the_dtype(folder):
    assert load_text_encoder(folder / "text_encoder").dtype == torch.float32
    assert load_text_encoder(folder / "text_encoder", dtype=torch.bfloat16).dtype == torch.bfloat16
    load_text_encoder(folder / "text_encoder").bfloat16().save_pretrained(folder / "small")
    assert load_text_encoder(folder / "small").dtype == torch.bfloat16


def test_load_reads_shards_and_variants(tmp_path):
    model = tiny_text_encoder()
    model.save_pretrained(tmp_path, variant="bf16", max_shard_size="40KB")
    assert len(list(tmp_path.glob("model.bf16-*.safetensors"))) > 1
    loaded = load_text_encoder(tmp_path, variant="bf16")
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    with pytest.raises(ValueError, match="cannot load the text encoder"):
        load_text_encoder(tmp_path)


@pytest.mark.parametrize("tied", [True, False])  # the head of its own is in the folder only if it is not tied
def test_load_takes_the_body_of_a_causal_model(tmp_path, tied):
    model = Gemma2ForCausalLM(tiny_text_encoder(tie_word_embeddings=tied).config)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Gemma2ForCausalLM"]
    loaded = load_text_encoder(tmp_path)
    assert type(loaded) is Gemma2Model
    for name, value in model.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_load_refuses_other_models_and_incomplete_folders(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load_text_encoder(tmp_path / "nothing")
    LlamaModel(
        LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        )
    ).save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="Gemma2Model, Gemma2ForCausalLM: LlamaModel"):
        load_text_encoder(tmp_path / "llama")
    tiny_text_encoder(num_hidden_layers=2).save_pretrained(tmp_path / "short")
    config = Gemma2Config.from_pretrained(tmp_path / "short")
    config.num_hidden_layers, config.layer_types = 3, [*config.layer_types, "full_attention"]
    config.save_pretrained(tmp_path / "short")
    with pytest.raises(ValueError, match=r"missing \['layers\.2"):
        load_text_encoder(tmp_path / "short")
    config.hidden_size = 16
    config.save_pretrained(tmp_path / "short")
    with pytest.raises(ValueError, match="cannot load the text encoder"):
        load_text_encoder(tmp_path / "short")


def test_load_reads_no_pickles(folder):
    weights = folder / "text_encoder" / "model.safetensors"
    weights.unlink()
    torch.save(tiny_text_encoder().state_dict(), weights.with_name("pytorch_model.bin"))
    with pytest.raises(ValueError, match="cannot load the text encoder"):
        load_text_encoder(folder / "text_encoder")


def test_load_refuses_fp16(folder):
    with pytest.raises(ValueError, match="float16"):
        load_text_encoder(folder / "text_encoder", dtype=torch.float16)
    tiny_text_encoder().half().save_pretrained(folder / "half")
    with pytest.raises(ValueError, match="float16"):
        load_text_encoder(folder / "half")
    assert load_text_encoder(folder / "half", dtype=torch.float32).dtype == torch.float32


def test_load_tokenizer_refuses_what_is_none(tmp_path):
    with pytest.raises(ValueError, match="no such tokenizer folder"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(ValueError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path)
