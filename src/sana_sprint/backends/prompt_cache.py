"""Encoding prompts by running only the tokens that are new: the instruction's keys and values are kept.

Gemma's attention is causal, so the instruction's keys and values are the same for every prompt. They are computed once, kept
in memory and on disk (`prompt_files`), and the prompt's own tokens run after them. The results are the same up to rounding.
Axes: B prompts, L text tokens, D text width.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sana_sprint.backends import prompt_files
from sana_sprint.backends.cuda.graphs import CallGraphs
from sana_sprint.backends.cuda.recorded import graphs_of
from sana_sprint.backends.weight_cache import all_tensors, weight_version
from sana_sprint.models.layers import autocast_dtype
from sana_sprint.models.text_encoder import PromptEncoder, Tokens

if TYPE_CHECKING:
    from transformers import DynamicCache, Gemma2Model, PreTrainedTokenizerBase

MAX_INSTRUCTIONS = 4  # kept in memory; each takes 24 MB with Gemma-2-2b in bf16


@dataclass(frozen=True)
class Prefix:
    """An instruction that was run: keys and values of each layer (1,heads,P,E), bos's hidden state (1,1,D)."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    bos: Tensor


class CachedPromptEncoder(PromptEncoder):
    """A `PromptEncoder` that runs an instruction once.

    Without gradients and with the model in eval mode, the instruction's keys and values are kept from call to
    call. They are dropped when a parameter is replaced, moved, cast or written to in place, as far as torch
    tells: it does not for writes through `.data`, for optimizers with `fused=True`, and for tensors that are no
    parameters, such as an adapter's scale. Call `clear_cache()` after those.

    With gradients enabled or in train mode nothing is kept, and the cache is cleared: the instruction runs
    once per call, for the whole batch, and gradients flow through it. With gradient checkpointing, which
    allows no cache, whole sequences are run.

    A text encoder that is recorded (`backends.record`) runs prompts as CUDA graphs.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text_encoder: Gemma2Model) -> None:
        super().__init__(tokenizer, text_encoder)
        self._prefixes: OrderedDict[object, Prefix] = OrderedDict()  # least recently used first
        self._version: object = None

    def __len__(self) -> int:
        """How many instructions are kept."""
        return len(self._prefixes)

    def clear_cache(self) -> None:
        """Forget every instruction's keys and values."""
        self._prefixes.clear()

    def run(self, tokens: Tokens) -> Tensor:
        if not self._may_keep():
            self.clear_cache()  # the weights may be about to change, and fused optimizers leave no trace
        shared = 0 if _ignores_cache(self.text_encoder) else _num_shared(tokens)
        if not shared:
            return super().run(tokens)
        ids, mask = tokens.batch(self.text_encoder.device)
        prefix = self._prefix(tokens.prefix)
        if mask is None:
            hidden = self._continued(prefix, shared, ids[:, shared:])
        else:
            hidden = continue_prefix(self.text_encoder, prefix, shared, ids[:, shared:], mask)
        bos = prefix.bos.expand(len(tokens.rows), -1, -1)
        return torch.cat([bos, hidden[:, tokens.window.start - shared :]], dim=1)

    def _continued(self, prefix: Prefix, shared: int, new: Tensor) -> Tensor:
        """Hidden states of tokens (B,L) after the first `shared` of the prefix: by a recording, if there are any."""
        model = self.text_encoder

        def run(ids: Tensor) -> Tensor:
            return continue_prefix(model, prefix, shared, ids)

        graphs = graphs_of(model)
        if isinstance(graphs, CallGraphs) and self._may_keep():
            length = new.shape[1]
            # As without: no token sees the padding behind it.
            ids = nn.functional.pad(new, (0, graphs.bucket(length) - length))
            key = (id(prefix), shared, autocast_dtype(model.device))
            hidden = graphs(key, (model,), run, ids)
            if hidden is not None:
                return hidden[:, :length]
        return run(new)

    def _may_keep(self) -> bool:
        return not torch.is_grad_enabled() and not self.text_encoder.training

    def _prefix(self, ids: tuple[int, ...]) -> Prefix:
        model = self.text_encoder
        if not self._may_keep():
            return run_prefix(model, ids)
        version = [weight_version(tensor) for tensor in all_tensors(model)]
        if version != self._version:
            self.clear_cache()
            self._version = version
        # Autocast decides the keys' dtype and leaves no trace in the parameters.
        key = (ids, autocast_dtype(model.device))
        if key not in self._prefixes:
            self._prefixes[key] = stored_prefix(model, ids)
            if len(self._prefixes) > MAX_INSTRUCTIONS:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(key)
        return self._prefixes[key]


def _num_shared(tokens: Tokens) -> int:
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


# ----- one instruction ------------------------------------------------------------------------------------------------


def run_prefix(model: Gemma2Model, ids: tuple[int, ...]) -> Prefix:
    """Runs the instruction's tokens."""
    from transformers import DynamicCache

    # Without a config the cache keeps every token, also in the layers with sliding-window attention.
    cache: Any = DynamicCache()
    input_ids = torch.tensor([ids], device=model.device)
    hidden = model(input_ids=input_ids, past_key_values=cache, use_cache=True).last_hidden_state
    return Prefix(
        keys=tuple(layer.keys for layer in cache.layers),
        values=tuple(layer.values for layer in cache.layers),
        bos=hidden[:, :1].clone(),  # a view would keep every token's hidden state alive
    )


def stored_prefix(model: Gemma2Model, ids: tuple[int, ...]) -> Prefix:
    """From the disk, or run and kept there; without gradients only."""
    name = prompt_files.name_of(model, ids, autocast_dtype(model.device))
    if name is None:
        return run_prefix(model, ids)
    tensors = prompt_files.read(name, model.device)
    if tensors is None or tensors.keys() != {"keys", "values", "bos"}:
        prefix = run_prefix(model, ids)
        layers = {"keys": torch.stack(prefix.keys), "values": torch.stack(prefix.values)}
        prompt_files.write(name, {**layers, "bos": prefix.bos})
        return prefix
    return Prefix(tensors["keys"].unbind(), tensors["values"].unbind(), tensors["bos"])


def continue_prefix(
    model: Gemma2Model, prefix: Prefix, length: int, ids: Tensor, seen: Tensor | None = None
) -> Tensor:
    """Hidden states (B,L,D) of tokens (B,L) that follow the prefix's first `length`.

    `seen` (B,length+L) is 0 for tokens that no other may see.
    """
    cache = start_cache(prefix, length, batch_size=len(ids))
    window = model.config.sliding_window
    total = length + ids.shape[1]
    masks: Any = seen
    if seen is None and (window is None or total <= window):  # every layer sees all that came before
        # transformers' own way to this mask copies from the CPU, which a CUDA graph must not.
        lowest = torch.finfo(model.dtype).min
        mask = torch.full((1, 1, ids.shape[1], total), lowest, dtype=model.dtype, device=ids.device)
        masks = dict.fromkeys(("full_attention", "sliding_attention"), mask.triu(length + 1))
    # A mask for each kind of layer is taken as it is.
    out = model(input_ids=ids, attention_mask=masks, past_key_values=cache, use_cache=True)
    hidden: Tensor = out.last_hidden_state
    return hidden


def start_cache(prefix: Prefix, length: int, *, batch_size: int) -> DynamicCache:
    """A fresh cache that begins with views of the prefix's first tokens; growing, its layers replace them."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for keys, values in zip(prefix.keys, prefix.values, strict=True):
        layer: Any = DynamicLayer()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
        layer.keys = keys[:, :, :length].expand(batch_size, -1, -1, -1)
        layer.values = values[:, :, :length].expand(batch_size, -1, -1, -1)
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        cache.layers.append(layer)
    return cache
