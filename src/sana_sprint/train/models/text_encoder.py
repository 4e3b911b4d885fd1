"""A text side small enough to train along: a BPE tokenizer learnt from captions, and a small Gemma 2."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_sprint.models.text_encoder import build_text_encoder
from sana_sprint.prompts import COMPLEX_HUMAN_INSTRUCTION

if TYPE_CHECKING:
    from transformers import Gemma2Model, PreTrainedTokenizerBase

SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")  # Gemma's ids 0 to 3


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Learns a byte-level BPE tokenizer from captions and the instruction; it lower-cases and puts bos first.

    Bytes are its alphabet, so any text in any language has tokens.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    # A space before the first word makes it the same token there as anywhere else.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The instruction is one text among many thousands; repeated, its words become tokens too.
    tokenizer.train_from_iterator([*captions, *COMPLEX_HUMAN_INSTRUCTION * 20], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", SPECIAL_TOKENS.index("<bos>"))]
    )
    wrap: Any = PreTrainedTokenizerFast  # transformers leaves it untyped
    wrapped: PreTrainedTokenizerBase = wrap(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    return wrapped


def make_text_encoder(vocab_size: int, settings: Mapping[str, Any]) -> Gemma2Model:
    """A Gemma 2 with random weights; `settings` are fields of its config."""
    from transformers import Gemma2Config

    config = Gemma2Config(
        vocab_size=vocab_size, pad_token_id=0, eos_token_id=1, bos_token_id=2, use_cache=True, **settings
    )
    return build_text_encoder(config)


def save_text(tokenizer: PreTrainedTokenizerBase, text_encoder: Gemma2Model, folder: Path) -> None:
    """Writes `tokenizer/` and `text_encoder/` (safetensors) into the folder."""
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    text_encoder.save_pretrained(str(folder / "text_encoder"))
