"""Prompts to text embeddings: a tokenizer and Gemma 2, run only over the tokens that are new.

Axes: B prompts, L text tokens, D text width.

The published pipeline puts an instruction of some 230 tokens in front of the prompt, pads the sum to some
530, runs all of it and throws most of it away. Gemma's attention is causal: no token sees a later one, so
padding behind the prompt changes nothing, and the instruction's keys and values are the same for every
prompt. `PromptEncoder` computes those once, keeps them, and runs the prompt's own tokens. The results are the
same up to rounding.

transformers is imported when a model is loaded or run, not with this module.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sana_sprint.models.prefix import Prefix, autocast_dtype, continue_prefix, run_prefix, stored_prefix
from sana_sprint.models.walk import state_of, tensors_of
from sana_sprint.precision import send
from sana_sprint.prompts import (
    DEFAULT_MAX_SEQUENCE_LENGTH,
    TokenWindow,
    join_instruction,
    normalise_prompt,
    token_window,
)

if TYPE_CHECKING:
    from transformers import Gemma2Model, PreTrainedTokenizerBase

MAX_PREFIXES = 4  # instructions remembered; each takes 24 MB with Gemma-2-2b in bf16
ARCHITECTURES = ("Gemma2Model", "Gemma2ForCausalLM")


@dataclass(frozen=True)
class PromptEmbeddings:
    """Encoded prompts, the condition of the image model.

    embeds: (B,L,D) in the text encoder's dtype, L the longest prompt of the batch; 0 where `mask` is False.
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

    def to(self, device: torch.device | str) -> PromptEmbeddings:
        """The tensors on `device`."""
        return PromptEmbeddings(self.embeds.to(device), self.mask.to(device), self.lost_tokens)


@dataclass(frozen=True)
class _Tokens:
    """The tokenised batch. `prefix` is the part of the instruction that lies before the window."""

    rows: list[list[int]]
    prefix: tuple[int, ...]
    window: TokenWindow
    lost: tuple[int, ...]


class PromptEncoder:
    """Turns prompts into `PromptEmbeddings` with a tokenizer and a `Gemma2Model`.

    Without gradients and with the model in eval mode, the instruction's keys and values are kept from call to
    call. They are dropped when a parameter is replaced, moved, cast or written to in place, as far as torch
    tells: it does not for writes through `.data`, for optimizers with `fused=True`, and for what is no
    parameter, such as an adapter's scale. Call `clear_cache()` after those.

    With gradients enabled or in train mode nothing is kept, and what was is dropped: the instruction runs
    once per call, for the whole batch, and gradients flow through it. With gradient checkpointing, which
    allows no cache, whole sequences are run.

    If the model has an attribute `graphs`, prompts go through it, see `sana_sprint.backends.cuda.graphs.CallGraphs`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text_encoder: Gemma2Model) -> None:
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self._prefixes: OrderedDict[object, Prefix] = OrderedDict()  # least recently used first
        self._fingerprint: object = None

    def clear_cache(self) -> None:
        """Forget every instruction's keys and values."""
        self._prefixes.clear()

    def encode(
        self,
        prompts: Sequence[str],
        *,
        max_sequence_length: int = DEFAULT_MAX_SEQUENCE_LENGTH,
        complex_human_instruction: Sequence[str] | None = None,
        clean_caption: bool = False,
    ) -> PromptEmbeddings:
        """Encode a batch; the same, at unmasked positions, as the published pipeline's padded encoding.

        Args:
            prompts: at least one; an empty prompt is allowed and is the published null prompt.
            max_sequence_length: embeddings per prompt at most, at least 2.
            complex_human_instruction: lines put before every prompt; None or empty for none.
            clean_caption: clean the prompts with `prompts.clean_caption` instead of only lower-casing them.

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
        num_tokens = tuple(tokens.window.num_kept(len(row)) for row in tokens.rows)
        embeds = self._run(tokens)
        mask = send(torch.arange(embeds.shape[1]) < torch.tensor(num_tokens)[:, None], embeds.device)
        if min(num_tokens) < max(num_tokens):
            embeds = embeds.masked_fill(~mask[..., None], 0.0)
        return PromptEmbeddings(
            embeds=embeds,
            mask=mask,
            lost_tokens=tokens.lost,
        )

    # ----- tokens -------------------------------------------------------------------------------------------

    def _tokenise(self, texts: list[str], instruction: str, max_sequence_length: int) -> _Tokens:
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
        return _Tokens(rows, tuple(alone[: window.start]), window, lost)

    def _token_ids(self, texts: list[str], max_length: int | None = None) -> list[list[int]]:
        # `verbose=False`: no warning that a text exceeds the model's maximum; `encode` reports what it cuts.
        encoded = self.tokenizer(
            texts, truncation=max_length is not None, max_length=max_length, padding=False, verbose=False
        )
        rows: list[list[int]] = encoded["input_ids"]
        return rows

    # ----- the model ----------------------------------------------------------------------------------------

    def _run(self, tokens: _Tokens) -> Tensor:
        """Hidden states (B,L,D) of position 0 and of the window, rows right-padded to the longest."""
        model, window = self.text_encoder, tokens.window
        if not self._may_keep():
            self.clear_cache()  # the weights may be about to change, and fused optimizers leave no trace
        shared = 0 if _ignores_cache(model) else _num_shared(tokens)
        # No attention mask: in a causal model no token sees the padding behind it, whatever that holds.
        new_rows = [torch.tensor(row[shared:]) for row in tokens.rows]
        new = send(nn.utils.rnn.pad_sequence(new_rows, batch_first=True), model.device)
        if not shared:
            hidden = model(input_ids=new, use_cache=False).last_hidden_state
            return torch.cat([hidden[:, :1], hidden[:, window.start :]], dim=1)
        prefix = self._prefix(tokens.prefix)
        hidden = self._continued(prefix, shared, new)
        bos = prefix.bos.expand(len(tokens.rows), -1, -1)
        return torch.cat([bos, hidden[:, window.start - shared :]], dim=1)

    def _continued(self, prefix: Prefix, shared: int, new: Tensor) -> Tensor:
        """Hidden states of tokens (B,L) that follow the first `shared` of the prefix: by a recording, if there are any."""
        model = self.text_encoder

        def run(ids: Tensor) -> Tensor:
            return continue_prefix(model, prefix, shared, ids)

        graphs: Any = getattr(model, "graphs", None)
        if graphs is not None and self._may_keep():
            length = new.shape[1]
            # As without: no token sees the padding behind it.
            padded = nn.functional.pad(new, (0, graphs.bucket(length) - length))
            key = (id(prefix), shared, autocast_dtype(model.device))
            hidden: Tensor | None = graphs(key, (model,), run, padded)
            if hidden is not None:
                return hidden[:, :length]
        return run(new)

    def _may_keep(self) -> bool:
        return not torch.is_grad_enabled() and not self.text_encoder.training

    def _prefix(self, ids: tuple[int, ...]) -> Prefix:
        model = self.text_encoder
        if not self._may_keep():
            return run_prefix(model, ids)
        fingerprint = [state_of(tensor) for tensor in tensors_of(model)]
        if fingerprint != self._fingerprint:
            self.clear_cache()
            self._fingerprint = fingerprint
        # Autocast decides the keys' dtype and leaves no trace in the parameters.
        key = (ids, autocast_dtype(model.device))
        if key not in self._prefixes:
            self._prefixes[key] = stored_prefix(model, ids)
            if len(self._prefixes) > MAX_PREFIXES:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(key)
        return self._prefixes[key]


def _num_shared(tokens: _Tokens) -> int:
    """Tokens at the front that every row shares with the prefix.

    Usually the whole prefix. A prompt whose first letters merge with the instruction's end shares a little
    less. No row is shared to its end: it stands for more text than the prefix does.
    """
    columns = zip(tokens.prefix, *tokens.rows, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _ignores_cache(model: Gemma2Model) -> bool:
    """Gemma's layers do without their cache when they are checkpointed."""
    return model.training and any(
        getattr(module, "gradient_checkpointing", False) for module in model.modules()
    )


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
            # Only this one caps the attention logits in every transformers 5; "sdpa" was once Gemma 2's
            # default and silently did not.
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(f"cannot load the text encoder in {folder}: {error}") from error
    _check_report(report, folder)
    _refuse_fp16(model.dtype)
    text_encoder: Gemma2Model = model.to(device).eval()
    return text_encoder


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
