"""Models whose calls are recorded as CUDA graphs, see `graphs`: classes for models that are there already.

`graphs` None, or arguments that graphs do not apply to: the model runs as always.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana_sprint.backends.cuda.graphs import CallGraphs, StepGraphs
from sana_sprint.backends.swap import Classes
from sana_sprint.models import autoencoder, controlnet
from sana_sprint.models.autoencoder import Network
from sana_sprint.models.controlnet import ControlContext, ControlStep, ControlSum
from sana_sprint.models.transformer import CaptionContext, Control, check_caption
from sana_sprint.models.transformer import SanaTransformer2DModel as PlainTransformer
from sana_sprint.stopping import ShouldStop

# Numbers of the widest grid on a GPU, whose kernels are slower at indices of more than 31 bits.
LARGEST_GRID = 2**30
LARGEST_RECORDED = 2**22  # pixels; launching more of them takes no time worth saving


class AutoencoderDC(autoencoder.AutoencoderDC):
    """On a GPU, with or without graphs, large batches run in parts."""

    graphs: CallGraphs | None = None

    def run(
        self,
        network: Network,
        x: Tensor,
        *,
        in_step: int,
        out_step: int,
        should_stop: ShouldStop | None = None,
    ) -> Tensor:
        step = self.spatial_compression_ratio // in_step  # pixels of a picture for one of x
        part = partial(self._run_part, network, step=step)
        return super().run(part, x, in_step=in_step, out_step=out_step, should_stop=should_stop)

    def _run_part(self, network: Network, x: Tensor, *, step: int) -> Tensor:
        pixels = x.shape[2] * x.shape[3] * step**2
        widest = pixels * self.config.decoder_block_out_channels[0]
        if x.is_cuda and len(x) * widest > LARGEST_GRID:
            parts = torch.split(x, max(1, LARGEST_GRID // widest))
            return torch.cat([self._launch(network, part, step=step) for part in parts])
        return self._launch(network, x, step=step)

    def _launch(self, network: Network, x: Tensor, *, step: int) -> Tensor:
        if self.graphs is not None and len(x) * x.shape[2] * x.shape[3] * step**2 <= LARGEST_RECORDED:
            assert isinstance(network, nn.Module)
            out = self.graphs(None, (network,), network, x)
            if out is not None:
                return out
        return network(x)


class SanaTransformer2DModel(PlainTransformer):
    graphs: StepGraphs | None = None

    def encode_caption(self, text: Tensor, text_mask: Tensor | None = None) -> CaptionContext:
        check_caption(self.config, text, text_mask)
        if self.graphs is not None:
            context = self.graphs.caption((self,), super().encode_caption, text, text_mask)
            if context is not None:
                return context
        return super().encode_caption(text, text_mask)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        context: CaptionContext,
        guidance: Tensor | None = None,
        control: Control | None = None,
    ) -> Tensor:
        self.check_inputs(hidden_states, timestep, context, guidance)
        out = None
        if isinstance(control, ControlStep):
            control = ControlSum((control,))
        if control is None and self.graphs is not None:
            out = self.graphs(self, hidden_states, timestep, context, guidance)
        elif isinstance(control, ControlSum):
            out = _controlled(self, hidden_states, timestep, context, guidance, control.steps)
        return super().forward(hidden_states, timestep, context, guidance, control) if out is None else out


class SanaControlNetModel(controlnet.SanaControlNetModel):
    """`graphs` also record the steps of a recorded transformer that this branch controls."""

    graphs: CallGraphs | None = None

    def encode_control_caption(
        self, transformer: PlainTransformer, text: Tensor, text_mask: Tensor | None = None
    ) -> CaptionContext:
        check_caption(self.config, text, text_mask)
        if self.graphs is not None:
            encode = partial(super().encode_control_caption, transformer)
            context = self.graphs.caption((self, self.embedders(transformer)), encode, text, text_mask)
            if context is not None:
                return context
        return super().encode_control_caption(transformer, text, text_mask)


def _controlled(
    model: SanaTransformer2DModel,
    latent: Tensor,
    timestep: Tensor,
    context: CaptionContext,
    guidance: Tensor | None,
    steps: Sequence[ControlStep],
) -> Tensor | None:
    """A step with control branches, in one launch; None where there are no recordings."""
    first = steps[0].controlnet
    graphs = first.graphs if isinstance(first, SanaControlNetModel) else None
    if graphs is None or guidance is None:
        return None
    parts = [(step.controlnet, step.scale) for step in steps]
    size = 2 * model.config.num_layers + 1  # tensors of the transformer's captions
    own = [2 * branch.config.num_layers + 1 for branch, _ in parts]

    # Not a method: a recording keeps what its function refers to, and contexts are a call's own.
    def run(latent: Tensor, timestep: Tensor, guidance: Tensor, *flat: Tensor) -> Tensor:
        captions, rest = _from_tensors(flat[:size]), flat[size:]
        rebuilt = []
        for (branch, scale), count in zip(parts, own, strict=True):
            (own_time, condition), rest = rest[:2], rest[2:]
            control = ControlContext(_from_tensors(rest[:count]), condition)
            rebuilt.append(ControlStep(branch, latent, own_time, control, guidance, scale))
            rest = rest[count:]
        return PlainTransformer.forward(
            model, latent, timestep, captions, guidance, ControlSum(tuple(rebuilt))
        )

    tokens = graphs.bucket(context.keys[0].shape[2])
    flat = [*_tensors(padded(context, tokens))]
    for step in steps:
        captions = padded(step.context.captions, tokens)
        flat += [step.timestep, step.context.condition, *_tensors(captions)]
    models = (model, *(branch for branch, _ in parts))
    key = tuple(scale for _, scale in parts)
    return graphs(key, models, run, latent, timestep, guidance, *flat)


def padded(context: CaptionContext, tokens: int) -> CaptionContext:
    """A context of so many tokens, of which the added ones have weight exactly 0. The bias is never None."""
    if context.bias is not None and tokens == context.bias.shape[-1]:
        return context
    batch, _, length, _ = context.keys[0].shape
    bias = context.bias
    if bias is None:
        bias = context.keys[0].new_zeros(batch, 1, 1, length, dtype=torch.float32)
    more = (0, 0, 0, tokens - length)
    return CaptionContext(
        keys=tuple(F.pad(key, more) for key in context.keys),
        values=tuple(F.pad(value, more) for value in context.values),
        bias=F.pad(bias, (0, tokens - length), value=float("-inf")),
    )


def _tensors(context: CaptionContext) -> tuple[Tensor, ...]:
    assert context.bias is not None
    return *context.keys, *context.values, context.bias


def _from_tensors(tensors: Sequence[Tensor]) -> CaptionContext:
    half = len(tensors) // 2
    return CaptionContext(tuple(tensors[:half]), tuple(tensors[half:-1]), tensors[-1])


def set_graphs(model: nn.Module, graphs: CallGraphs | StepGraphs | None) -> None:
    """Give a model of these classes its graphs; those of any other are noted here, for who calls it."""
    if isinstance(model, AutoencoderDC | SanaControlNetModel | SanaTransformer2DModel):
        model.__dict__.pop("graphs", None)
        if graphs is not None:
            model.__dict__["graphs"] = graphs
    elif graphs is None:
        _of_others.pop(model, None)
    else:
        _of_others[model] = graphs


def graphs_of(model: nn.Module) -> CallGraphs | StepGraphs | None:
    """The graphs of a model, None if its calls are not recorded."""
    if isinstance(model, AutoencoderDC | SanaControlNetModel | SanaTransformer2DModel):
        return model.graphs
    return _of_others.get(model)


_of_others: WeakKeyDictionary[nn.Module, CallGraphs | StepGraphs] = WeakKeyDictionary()

CLASSES: Classes = {
    controlnet.SanaControlNetModel: SanaControlNetModel,
    PlainTransformer: SanaTransformer2DModel,
}
