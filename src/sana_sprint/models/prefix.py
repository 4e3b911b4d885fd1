"""An instruction that has been run: its keys and values, from which every prompt goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sana_sprint.models import prefix_store

if TYPE_CHECKING:
    from transformers import DynamicCache, Gemma2Model


@dataclass(frozen=True)
class Prefix:
    """A prefix that has been run: keys and values of each layer (1,heads,P,E), bos's hidden state (1,1,D)."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    bos: Tensor


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
    name = prefix_store.name_of(model, ids, autocast_dtype(model.device))
    if name is None:
        return run_prefix(model, ids)
    tensors = prefix_store.read(name, model.device)
    if tensors is None or tensors.keys() != {"keys", "values", "bos"}:
        prefix = run_prefix(model, ids)
        layers = {"keys": torch.stack(prefix.keys), "values": torch.stack(prefix.values)}
        prefix_store.write(name, {**layers, "bos": prefix.bos})
        return prefix
    return Prefix(tensors["keys"].unbind(), tensors["values"].unbind(), tensors["bos"])


def continue_prefix(model: Gemma2Model, prefix: Prefix, length: int, ids: Tensor) -> Tensor:
    """Hidden states (B,L,D) of tokens (B,L) that follow the prefix's first `length`."""
    cache = start_cache(prefix, length, batch_size=len(ids))
    window = model.config.sliding_window
    total = length + ids.shape[1]
    masks: Any = None
    if window is None or total <= window:  # every layer sees all that came before
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


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Autocast's, if it is on."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
