"""Callbacks after each step of a call, which may replace latents and embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sana_sprint.pipelines.denoise import Conditioning

# callback(pipeline, step index, time, tensors) -> tensors to go on with, or None
StepCallback = Callable[[Any, int, Tensor, dict[str, Tensor]], Mapping[str, Tensor] | None]

EMBEDS = "prompt_embeds"
CALLBACK_TENSORS = ("latents", EMBEDS)


def tensor_inputs(callback: StepCallback | None, names: Sequence[str] | None) -> Sequence[str]:
    """The names of a callback's tensors: its own `tensor_inputs`, which published callback objects have, or `names`.

    None stands for no names.

    Raises ValueError unless all are names of tensors that a callback can get.
    """
    names = getattr(callback, "tensor_inputs", names)
    if names is None:
        return ()
    if isinstance(names, str) or not all(name in CALLBACK_TENSORS for name in names):
        raise ValueError(
            f"callback_on_step_end_tensor_inputs must be a list of names out of {', '.join(CALLBACK_TENSORS)}; "
            f"got: {names!r}"
        )
    return names


@dataclass
class StepHook:
    """An `on_step` for the sampling loop that hands the caller's callback the published tensors.

    The published `latents` are in data space, sigma_data times the u of the loop.
    """

    callback: StepCallback
    pipeline: Any
    names: Sequence[str]
    conditioning: Conditioning
    sigma_data: float

    def __call__(self, i: int, t: float, u: Tensor) -> Tensor | None:
        tensors = {"latents": u * self.sigma_data, EMBEDS: self.conditioning.text.embeds}
        changed = self.callback(
            self.pipeline, i, torch.tensor(t), {name: tensors[name] for name in self.names}
        )
        if changed is None:
            return None
        if unknown := sorted(set(changed) - set(CALLBACK_TENSORS)):
            raise ValueError(
                f"callback_on_step_end returned unknown tensors: {', '.join(unknown)}; "
                f"known: {', '.join(CALLBACK_TENSORS)}"
            )
        for name, tensor in changed.items():
            if tensor.shape != tensors[name].shape:
                raise ValueError(
                    f"callback_on_step_end returned {name} of shape {tuple(tensor.shape)}; "
                    f"expected {tuple(tensors[name].shape)}"
                )
        if EMBEDS in changed:
            self.conditioning.replace_text(changed[EMBEDS])
        return changed["latents"].to(u) / self.sigma_data if "latents" in changed else None
