"""Speed for models, put on them from outside: the classes of their modules are exchanged for faster ones.

    backends.apply(model)  # the default, in which pipelines and training run
    backends.use_kernels(model)  # Triton kernels, for inference on CUDA
    backends.record(model, StepGraphs())  # CUDA graphs
    backends.remove(model)  # the plain model

Weights, names, hooks and files stay as they are; results are the same up to rounding. Each call may be repeated, and models
may be moved, cast, copied, quantised and adapted before and after. None of them may run while the model does.
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from sana_sprint.backends.cpu import autoencoder as cpu_autoencoder
from sana_sprint.backends.cpu import transformer as cpu_transformer
from sana_sprint.backends.cuda import autoencoder as cuda_autoencoder
from sana_sprint.backends.cuda import device, recorded
from sana_sprint.backends.cuda import transformer as cuda_transformer
from sana_sprint.backends.cuda.graphs import CallGraphs, StepGraphs
from sana_sprint.backends.swap import Classes, inverse, swap
from sana_sprint.models import autoencoder

ModelT = TypeVar("ModelT", bound=nn.Module)

_DEFAULT: Classes = {
    **cpu_autoencoder.CLASSES,
    **cpu_transformer.CLASSES,
    autoencoder.AutoencoderDC: recorded.AutoencoderDC,
}
_KERNELS: Classes = {**cuda_autoencoder.CLASSES, **cuda_transformer.CLASSES}


def apply(model: ModelT) -> ModelT:
    """Put the default classes on a model, and return it: fewer operations and less memory without gradients.

    They pay on a CPU above all, see `cpu`; on a GPU, upsampling takes fewer operations and large batches of pictures run in
    parts. A model that has them, and one of another library, stays as it is.
    """
    swap(model, _DEFAULT)
    return model


def remove(model: ModelT) -> ModelT:
    """Make a model plain again, and return it: without kernels, graphs and the default classes."""
    use_kernels(model, enabled=False)
    record(model, None)
    swap(model, inverse(_DEFAULT))
    return model


def use_kernels(model: nn.Module, enabled: bool = True) -> None:
    """Have a model use fused Triton kernels where these apply (see `cuda`), or never; also puts on the default classes.

    Transformer, control branch, autoencoder and transformers' Gemma 2 have kernels.

    Raises:
        ValueError: if enabled and Triton is not installed.
    """
    classes = _KERNELS
    if type(model).__module__.startswith("transformers."):
        from sana_sprint.backends.cuda import text_encoder

        classes = {**classes, **text_encoder.CLASSES}
    if enabled:
        device.check_triton()
        swap(apply(model), classes)
    else:
        swap(model, inverse(classes))


def record(model: nn.Module, graphs: CallGraphs | StepGraphs | None) -> None:
    """Record a model's calls as CUDA graphs from now on, or None: no more.

    A transformer's are `StepGraphs`; those of an autoencoder, a control branch or a text encoder `CallGraphs`. A text
    encoder's are used by `prompt_cache`.
    """
    if isinstance(model, autoencoder.AutoencoderDC):
        apply(model)
    elif graphs is not None:
        swap(model, recorded.CLASSES)
    recorded.set_graphs(model, graphs)
    if graphs is None:
        swap(model, inverse(recorded.CLASSES))


def recordings(model: nn.Module) -> CallGraphs | StepGraphs | None:
    """The graphs that `record` gave a model."""
    return recorded.graphs_of(model)
