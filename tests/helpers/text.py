"""A tokenizer and a Gemma 2 small enough for any test, made in code."""

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

from sana_sprint.backends.prompt_cache import CachedPromptEncoder
from sana_sprint.models.text_encoder import PromptEmbeddings, PromptEncoder
from sana_sprint.prompts import COMPLEX_HUMAN_INSTRUCTION

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")  # Gemma's ids 0 to 3
LETTERS = [chr(code) for code in range(33, 127)] + ["▁", "\n"]
WORDS = "a the red blue cat dogs on of and in photo moon astronaut egg tiny hatching from"
INSTRUCTION = ("Describe the picture.", "- User: A cat -> A cat on the moon", "User: ")


def _finish(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Gemma's surroundings: blanks become ▁, bos is put first, nothing last."""
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Replace("▁", " ")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


@functools.cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    # Words are learnt with the blank before them, as Gemma's are: a trailing blank merges with the next word.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=LETTERS, show_progress=False
    )
    corpus = [
        line.replace(" ", "▁") for line in (*COMPLEX_HUMAN_INSTRUCTION, *INSTRUCTION, *[f" {WORDS}"] * 5)
    ]
    tokenizer.train_from_iterator(corpus, trainer)
    return str(tokenizer.to_str())


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """400 tokens, most of them words with their blank, bos first."""
    return _finish(Tokenizer.from_str(_trained()))


def merging_tokenizer(merges: Sequence[tuple[str, str]]) -> PreTrainedTokenizerFast:
    """Letters, and these merges only, applied across blanks and punctuation."""
    tokens = [*SPECIAL_TOKENS, *LETTERS, *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return _finish(Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges), unk_token="<unk>")))


def tiny_text_encoder(*, vocab_size: int = 400, hidden_size: int = 32, **overrides: object) -> Gemma2Model:
    """Four layers in fp32, eval mode. The weights are large enough for every token to feel those before it."""
    settings: dict[str, object] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "attn_implementation": "eager",  # what load_text_encoder chooses
    }
    config = Gemma2Config(**(settings | overrides))
    generator = torch.Generator().manual_seed(0)
    model = Gemma2Model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def save_tiny_text(folder: Path) -> None:
    """Write `tokenizer/` and `text_encoder/` as a published model folder has them."""
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    tiny_text_encoder().save_pretrained(folder / "text_encoder")


def tiny_encoder() -> CachedPromptEncoder:
    """As in pipelines and training."""
    return CachedPromptEncoder(tiny_tokenizer(), tiny_text_encoder())


# ----- the published encoding -------------------------------------------------------------------------------

PROMPTS = [
    "",
    "a",
    "A Cat ",
    "a tiny astronaut hatching from an egg on the moon",
    "zebra crossing, 3 dogs\nand more " * 6,
]
# fp32, values up to about 4, four layers: the two sides sum the same numbers in other orders (5e-6 seen).
FP32_ATOL = 2e-5


def padded_reference(
    encoder: PromptEncoder, prompts: Sequence[str], length: int, instruction: Sequence[str] | None
) -> tuple[Tensor, Tensor]:
    """The published procedure: pad to the full length, run everything, select bos and the last positions."""
    front = "\n".join(instruction or ())
    total = len(encoder.tokenizer.encode(front)) + length - 2 if front else length
    tokens = encoder.tokenizer(
        [front + prompt.lower().strip() for prompt in prompts],
        padding="max_length",
        max_length=total,
        truncation=True,
        return_tensors="pt",
    )
    hidden = encoder.text_encoder(
        input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
    ).last_hidden_state
    positions = [0, *range(total - length + 1, total)]
    return hidden[:, positions], tokens.attention_mask[:, positions].bool()


def assert_equals_reference(
    ours: PromptEmbeddings, reference: tuple[Tensor, Tensor], *, atol: float = FP32_ATOL
) -> None:
    embeds, mask = reference
    L = ours.mask.shape[1]
    assert ours.embeds.shape == (*ours.mask.shape, embeds.shape[-1])
    assert mask.sum(1).max() == L
    assert torch.equal(ours.mask, mask[:, :L])
    assert ours.num_tokens == tuple(mask.sum(1).tolist())
    torch.testing.assert_close(ours.embeds[ours.mask], embeds[mask], atol=atol, rtol=0)
    assert not ours.embeds[~ours.mask].any()


def record_runs(model: Gemma2Model) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes
