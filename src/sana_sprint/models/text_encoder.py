"""Prompts to text embeddings, by a tokenizer and Gemma 2; and Gemma 2 from its folder.

The published pipeline puts an instruction of some 230 tokens in front of the prompt, pads the sum to some 530 tokens, and
keeps the first embedding and the last 299. Gemma's attention is causal: no token sees a later one, so padding behind the
prompt changes nothing and is left out here, up to rounding.

Axes: B prompts, L text tokens, D text width. transformers is imported when a model is loaded or run, not with this module.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sana_sprint.models.layers import autocast_dtype
from sana_sprint.precision import send
from sana_sprint.prompts import (
    DEFAULT_MAX_SEQUENCE_LENGTH,
    TokenWindow,
    join_instruction,
    normalise_prompt,
    token_window,
)

if TYPE_CHECKING:
    from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerBase

ARCHITECTURES = ("Gemma2Model", "Gemma2ForCausalLM")
# The one that caps the attention logits in every transformers 5, as Gemma 2 must: "sdpa" was once its default and silently
# did not.
ATTENTION = "eager"


@dataclass(frozen=True)
class PromptEmbeddings:
    """Encoded prompts, the condition of the image model.

    embeds: (B,L,D) in the text encoder's dtype. L is the longest prompt of the batch, and values are 0 where `mask` is False;
        from `PromptEncoder.encode(pad=True)` L is the whole window, and the padding has hidden states of its own.
    mask: (B,L) bool, True where there is a token. Position 0 is bos.
    lost_tokens: per prompt (not per row, see `repeat`), the number of tokens cut off at its end.
    """

    embeds: Tensor
    mask: Tensor
    lost_tokens: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> tuple[int, ...]:
        """Tokens of each row, the row sums of `mask`. Waits for the device."""
        return tuple(self.mask.sum(1).tolist())

    @property
    def truncated(self) -> tuple[bool, ...]:
        """Per prompt, whether its end was cut off."""
        return tuple(lost > 0 for lost in self.lost_tokens)

    def repeat(self, count: int) -> PromptEmbeddings:
        """Each row `count` times in succession."""
        embeds, mask = (x.repeat_interleave(count, dim=0) for x in (self.embeds, self.mask))
        return PromptEmbeddings(embeds, mask, self.lost_tokens)

    def trimmed(self) -> PromptEmbeddings:
        """Without the last positions where no row has a token; unchanged off the CPU, where asking waits for the device."""
        if self.mask.device.type != "cpu":
            return self
        used = self.mask.any(0).nonzero()
        length = int(used[-1]) + 1 if len(used) else self.mask.shape[1]
        return PromptEmbeddings(self.embeds[:, :length], self.mask[:, :length], self.lost_tokens)

    def to(self, device: torch.device | str) -> PromptEmbeddings:
        """The tensors on `device`."""
        return PromptEmbeddings(self.embeds.to(device), self.mask.to(device), self.lost_tokens)


@dataclass(frozen=True)
class Tokens:
    """A tokenised batch.

    rows: each prompt's tokens, after the instruction's. prefix: the instruction's, as far as they lie before the window.
    window: the positions that become embeddings, with position 0. lost: per prompt, how many tokens were cut off.
    padding: the token that fills every row up to the window's end, seen by no token; None: rows end where they end.
    """

    rows: list[list[int]]
    prefix: tuple[int, ...]
    window: TokenWindow
    lost: tuple[int, ...]
    padding: int | None = None

    def batch(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """The rows as one tensor (B,L), and the mask (B,L) of tokens that may be seen, for rows with padding only.

        Without a mask the shorter rows have zeros behind: in a causal model no token sees what comes after it.
        """
        if self.padding is None:
            return padded(self.rows, device), None
        end = self.window.end
        ids = [[*row, *[self.padding] * (end - len(row))] for row in self.rows]
        lengths = torch.tensor([len(row) for row in self.rows])
        return padded(ids, device), send((torch.arange(end) < lengths[:, None]).long(), device)


class PromptEncoder:
    """Turns prompts into `PromptEmbeddings` with a tokenizer and a `Gemma2Model`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text_encoder: Gemma2Model) -> None:
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder

    def encode(
        self,
        prompts: Sequence[str],
        *,
        max_sequence_length: int = DEFAULT_MAX_SEQUENCE_LENGTH,
        complex_human_instruction: Sequence[str] | None = None,
        clean_caption: bool = False,
        pad: bool = False,
    ) -> PromptEmbeddings:
        """Encode a batch; the same, at unmasked positions, as the published pipeline's padded encoding.

        Args:
            prompts: at least one; an empty prompt is allowed and is the published null prompt.
            max_sequence_length: embeddings per prompt at most, at least 2.
            complex_human_instruction: lines put before every prompt; None or empty for none.
            clean_caption: clean the prompts with `prompts.clean_caption` instead of only lower-casing them.
            pad: fill up to `max_sequence_length` and encode the padding too, which takes longer: the same at all positions.

        Raises:
            ValueError: for a string instead of a sequence, no prompts, a bad length, a tokenizer that gives
                no tokens, or a text encoder in fp16.
            ImportError: if `clean_caption` is asked for and its libraries are missing.
        """
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts must be a non-empty sequence of strings: {prompts!r}")
        _refuse_fp16(self.text_encoder.dtype)
        _refuse_fp16(autocast_dtype(self.text_encoder.device))
        texts = [normalise_prompt(prompt, clean=clean_caption) for prompt in prompts]
        tokens = self._tokenise(texts, join_instruction(complex_human_instruction), max_sequence_length)
        if pad:
            tokens = replace(tokens, padding=self.tokenizer.pad_token_id or 0)
        num_tokens = tuple(tokens.window.num_kept(len(row)) for row in tokens.rows)
        embeds = self.run(tokens)
        mask = send(torch.arange(embeds.shape[1]) < torch.tensor(num_tokens)[:, None], embeds.device)
        if not pad and min(num_tokens) < max(num_tokens):
            embeds = embeds.masked_fill(~mask[..., None], 0.0)
        return PromptEmbeddings(
            embeds=embeds,
            mask=mask,
            lost_tokens=tokens.lost,
        )

    # ----- tokens -------------------------------------------------------------------------------------------

    def _tokenise(self, texts: list[str], instruction: str, max_sequence_length: int) -> Tokens:
        """The joined string is what gets tokenised; the instruction alone says where the window is."""
        alone = self._token_ids([instruction])[0] if instruction else []
        window = token_window(max_sequence_length, len(alone) if instruction else None)
        joined = [instruction + text for text in texts]
        rows = self._token_ids(joined)
        lost = tuple(window.num_lost(len(row)) for row in rows)
        for i, num_lost in enumerate(lost):
            if num_lost:  # cut by the tokenizer, which knows from which side and what to keep
                rows[i] = self._token_ids([joined[i]], max_length=window.end)[0]
        if not all(rows):
            raise ValueError("the tokenizer gave no tokens for a prompt: it must put bos first")
        return Tokens(rows, tuple(alone[: window.start]), window, lost)

    def _token_ids(self, texts: list[str], max_length: int | None = None) -> list[list[int]]:
        # `verbose=False`: no warning that a text exceeds the model's maximum; `encode` reports what it cuts.
        encoded = self.tokenizer(
            texts, truncation=max_length is not None, max_length=max_length, padding=False, verbose=False
        )
        rows: list[list[int]] = encoded["input_ids"]
        return rows

    # ----- the model ----------------------------------------------------------------------------------------

    def run(self, tokens: Tokens) -> Tensor:
        """Hidden states (B,L,D) of position 0 and of the window, rows right-padded to the longest or to the window."""
        ids, mask = tokens.batch(self.text_encoder.device)
        hidden = self.text_encoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return torch.cat([hidden[:, :1], hidden[:, tokens.window.start :]], dim=1)


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Rows of tokens as one tensor (B,L), the shorter ones with zeros behind."""
    tensors = [torch.tensor(row) for row in rows]
    return send(nn.utils.rnn.pad_sequence(tensors, batch_first=True), device)


def _refuse_fp16(dtype: torch.dtype | None) -> None:
    if dtype == torch.float16:
        raise ValueError(
            "the text encoder cannot run in float16, where Gemma 2's activations overflow: "
            "use torch.bfloat16 or torch.float32"
        )


# ----- loading ----------------------------------------------------------------------------------------------


def load_text_encoder(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    variant: str | None = None,
) -> Gemma2Model:
    """Load a folder of config.json and (sharded) safetensors as a `Gemma2Model` in eval mode.

    Args:
        folder: a `text_encoder/` folder. A causal language model's is accepted too; its head is left out.
        dtype: bfloat16 or float32; None for the dtype the folder is stored in.
        device: where to put the model.
        variant: load `model.<variant>.safetensors` instead of `model.safetensors`.

    Raises:
        ValueError: for a folder that is missing, incomplete, without safetensors or of another model type,
            for weights that do not fit the config, and for float16.
    """
    from transformers import Gemma2Model

    _refuse_fp16(dtype)
    _check_architecture(Path(folder))
    load: Any = Gemma2Model.from_pretrained  # its annotation leaves out the report
    try:
        model, report = load(
            str(folder),
            dtype=dtype or "auto",
            variant=variant,
            use_safetensors=True,
            attn_implementation=ATTENTION,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(f"cannot load the text encoder in {folder}: {error}") from error
    _check_report(report, folder)
    _refuse_fp16(model.dtype)
    text_encoder: Gemma2Model = model.to(device).eval()
    return text_encoder


def build_text_encoder(config: Gemma2Config, *, random_weights: bool = True) -> Gemma2Model:
    """A `Gemma2Model` of this config with random weights, or unset ones for a file to fill."""
    from transformers import Gemma2Model
    from transformers.initialization import no_init_weights

    config._attn_implementation = ATTENTION
    if random_weights:
        return Gemma2Model(config)
    with no_init_weights():
        return Gemma2Model(config)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load a `tokenizer/` folder.

    Raises:
        ValueError: if the folder is missing or holds no tokenizer.
    """
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise ValueError(f"no such tokenizer folder: {folder}")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the tokenizer in {folder}: {error}") from error
    return tokenizer


def _check_architecture(folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"no text encoder in {folder}: config.json is missing")
    config = json.loads(path.read_text(encoding="utf-8"))
    found = config.get("architectures") or [f"model type {config.get('model_type')}"]
    if config.get("model_type") != "gemma2" or found[0] not in ARCHITECTURES:
        raise ValueError(
            f"the text encoder must be one of {', '.join(ARCHITECTURES)}: {found[0]} in {folder}"
        )


def _check_report(report: dict[str, Any], folder: str | Path) -> None:
    """Missing weights would otherwise be drawn at random, with no more than a log line."""
    missing, unexpected = (sorted(report[kind]) for kind in ("missing_keys", "unexpected_keys"))
    # A causal model's head is not needed here.
    unexpected = [key for key in unexpected if key != "lm_head.weight"]
    if missing or unexpected:
        raise ValueError(f"the weights in {folder} do not fit: missing {missing}, unexpected {unexpected}")
