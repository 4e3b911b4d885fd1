"""Models as CUDA graphs: recorded once for a shape, then launched as a whole.

A step of the 1.6B transformer is a thousand launches, a prompt through Gemma two thousand, and at batch 1 they take longer
than what they launch. A graph reads its inputs from fixed places, into which each call copies its own. Captions have any
number of tokens: they are padded to a multiple of `TOKENS`, and padding gets weight exactly 0, so few graphs serve all.

A graph remembers addresses. It is found again only for the same weights and the same code (the modules' classes), so LoRAs,
a cast, a move or other kernels make new ones.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from sana_sprint.backends.weight_cache import all_modules, all_tensors
from sana_sprint.models.transformer import CaptionContext, SanaTransformer2DModel, masked_bias
from sana_sprint.torch_private import copy_all

TOKENS = 32  # captions are padded to a multiple of this
DEFAULT_LIMIT = 16  # graphs; they share the memory of what they compute, and hold their inputs


class Recording(Protocol):
    """The launches of a function, ready to be repeated into the same output."""

    output: Tensor

    def replay(self) -> None: ...


Recorder = Callable[[Callable[[], Tensor]], Recording]
_Placed = TypeVar("_Placed")  # a recording and the places of its inputs


class _Graphs:
    """Recordings by key, of which the one unused for longest makes room. Threads may share it."""

    def __init__(
        self, limit: int = DEFAULT_LIMIT, *, record: Recorder | None = None, device_type: str = "cuda"
    ) -> None:
        """For `limit` graphs, of which the one unused for longest makes room.

        Raises:
            ValueError: for a limit below 1.
        """
        if limit < 1:
            raise ValueError(f"limit must be a whole number from 1 up, got: {limit}")
        self.limit = limit
        self._record = CudaRecorder() if record is None else record
        self._device_type = device_type
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._last: torch.cuda.Event | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.limit,)  # a copied model records graphs of its own

    @staticmethod
    def bucket(tokens: int) -> int:
        """The number of tokens up to which a caption is padded."""
        return -(-tokens // TOKENS) * TOKENS

    def _applies(self, x: Tensor, models: Sequence[nn.Module]) -> bool:
        return not (
            x.device.type != self._device_type
            or torch.is_grad_enabled()
            or any(model.training for model in models)
            or torch.compiler.is_compiling()
            or (x.is_cuda and torch.cuda.is_current_stream_capturing())  # part of another recording
        )

    def _replay(
        self,
        key: Hashable,
        device: torch.device,
        place: Callable[[], _Placed],
        fill: Callable[[_Placed], None],
        run: Callable[[_Placed], Tensor],
    ) -> Tensor:
        """The result of the recording with this key, which is made if there is none.

        `place` makes the fixed places of its inputs, `fill` puts a call's inputs there, `run` is what is recorded.
        """
        with self._lock, self._in_turn(device):
            placed: Any = self._kept.get(key)
            if placed is None:
                self._make_room()
                placed = place()
                fill(placed)
                placed.recording = self._record(lambda: run(placed))
                self._kept[key] = placed
            else:
                fill(placed)
            self._kept.move_to_end(key)
            placed.recording.replay()
            out: Tensor = placed.recording.output.clone()
            return out

    def _make_room(self) -> None:
        while len(self._kept) >= self.limit:
            if self._device_type == "cuda":
                torch.cuda.synchronize()  # the graph that goes may still be running
            self._kept.popitem(last=False)

    @contextmanager
    def _in_turn(self, device: torch.device) -> Iterator[None]:
        """Callers' streams take turns: graphs share memory."""
        if device.type != "cuda":
            yield
            return
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream()
            if self._last is not None:
                stream.wait_event(self._last)
            yield
            self._last = stream.record_event()

    def _call(
        self,
        key: Hashable,
        models: Sequence[nn.Module],
        function: Callable[..., Tensor],
        inputs: tuple[Tensor, ...],
    ) -> Tensor | None:
        """`function(*inputs)`, or None where graphs do not apply. See `CallGraphs`."""
        if not self._applies(inputs[0], models):
            return None
        device = inputs[0].device
        shapes = tuple((x.shape, x.stride(), x.dtype) for x in inputs)
        whole = (key, shapes, device, _state(models))

        def place() -> _Call:
            return _Call(tuple(torch.empty_like(x) for x in inputs), function)

        return self._replay(whole, device, place, lambda call: call.fill(inputs), _Call.run)

    def caption(
        self,
        models: Sequence[nn.Module],
        encode: Callable[[Tensor], CaptionContext],
        text: Tensor,
        text_mask: Tensor | None,
    ) -> CaptionContext | None:
        """`encode(text)` under the mask's bias, of as many tokens as the steps' recordings have; None where graphs do not
        apply. Whether the mask hides anything would have to be asked of the device, so there always is a bias.

        models: those with the weights that `encode` uses.
        """
        length = text.shape[1]
        more = self.bucket(length) - length

        def run(text: Tensor) -> Tensor:
            context = encode(text)
            return torch.stack([*context.keys, *context.values])

        flat = self._call("caption", models, run, (nn.functional.pad(text, (0, 0, 0, more)),))
        if flat is None:
            return None
        keys, values = flat.chunk(2)
        bias = masked_bias(text.new_ones(text.shape[:2]) if text_mask is None else text_mask)
        bias = nn.functional.pad(bias, (0, more), value=float("-inf"))
        return CaptionContext(keys.unbind(), values.unbind(), bias)


class CallGraphs(_Graphs):
    """Recorded calls of any function of tensors, such as a decoder."""

    def __call__(
        self, key: Hashable, models: Sequence[nn.Module], function: Callable[..., Tensor], *inputs: Tensor
    ) -> Tensor | None:
        """`function(*inputs)`, or None where graphs do not apply: training, compiling, another device.

        Args:
            key: what the function depends on beside its inputs and the models' weights. What it reads and is neither
                must not change, and stays alive as long as the recording.
            models: those with the weights that the function uses.
            function: of tensors on one device to a tensor.
            inputs: its arguments; another shape or dtype is another recording.
        """
        return self._call(key, models, function, inputs)


@dataclass
class _Call:
    """The fixed places of a call's inputs, and its recording. It keeps the function, and so what that refers to."""

    places: tuple[Tensor, ...]
    function: Callable[..., Tensor]
    recording: Any = None

    def fill(self, inputs: tuple[Tensor, ...]) -> None:
        copy_all(self.places, inputs)

    def run(self) -> Tensor:
        return self.function(*self.places)


class StepGraphs(_Graphs):
    """Recorded steps of a transformer and of its copies with other LoRA strengths."""

    def __call__(
        self,
        model: SanaTransformer2DModel,
        latent: Tensor,
        timestep: Tensor,
        context: CaptionContext,
        guidance: Tensor | None,
    ) -> Tensor | None:
        """The transformer's velocity, or None where graphs do not apply: training, compiling, another device."""
        if not self._applies(latent, (model,)):
            return None
        tokens = self.bucket(context.keys[0].shape[2])
        has_bias = context.bias is not None or context.keys[0].shape[2] != tokens
        key = (
            *(None if x is None else (x.shape, x.dtype) for x in (latent, timestep, guidance)),
            (latent.device, context.keys[0].dtype, tokens, has_bias),
            _state((model,)),
        )

        def place() -> _Step:
            return _Step.like(latent, timestep, context, guidance, tokens, has_bias)

        def fill(step: _Step) -> None:
            step.fill(latent, timestep, context, guidance)

        return self._replay(key, latent.device, place, fill, lambda step: step.run(model))


class CudaRecorder:
    """Records CUDA graphs in one memory pool: no two of them run at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Callable[[], Tensor]) -> Recording:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        present = torch.cuda.current_stream()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it without types
        side.wait_stream(present)
        with torch.cuda.stream(side):
            function()  # compiles kernels and makes libraries' workspaces, which a capture must not
        present.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with calls that a global capture would forbid.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = function()
        return _CudaRecording(graph, output)


@dataclass
class _CudaRecording:
    graph: torch.cuda.CUDAGraph
    output: Tensor

    def replay(self) -> None:
        self.graph.replay()


@dataclass
class _Step:
    """The fixed places of a step's inputs, and its recording."""

    latent: Tensor
    timestep: Tensor
    guidance: Tensor | None
    context: CaptionContext
    recording: Recording | None = None
    filled_with: weakref.ref[CaptionContext] | None = None

    @classmethod
    def like(
        cls,
        latent: Tensor,
        timestep: Tensor,
        context: CaptionContext,
        guidance: Tensor | None,
        tokens: int,
        has_bias: bool,
    ) -> _Step:
        """Places for inputs of these shapes, and for captions of `tokens`."""

        def places(rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            # Zeros: a weight of 0 would not silence a NaN.
            return tuple(row.new_zeros(*row.shape[:2], tokens, row.shape[3]) for row in rows)

        bias = latent.new_zeros(len(latent), 1, 1, tokens, dtype=torch.float32) if has_bias else None
        return cls(
            latent=torch.empty_like(latent, memory_format=torch.contiguous_format),
            timestep=torch.empty_like(timestep),
            guidance=None if guidance is None else torch.empty_like(guidance),
            context=CaptionContext(places(context.keys), places(context.values), bias),
        )

    def fill(
        self, latent: Tensor, timestep: Tensor, context: CaptionContext, guidance: Tensor | None
    ) -> None:
        """Put a call's inputs in place; the captions only if they are not there already, as in a call's later steps."""
        self.latent.copy_(latent)
        self.timestep.copy_(timestep)
        if self.guidance is not None and guidance is not None:
            self.guidance.copy_(guidance)
        if self.filled_with is not None and self.filled_with() is context:
            return
        length = context.keys[0].shape[2]
        own = [place[:, :, :length] for place in (*self.context.keys, *self.context.values)]
        copy_all(own, [*context.keys, *context.values])
        if self.context.bias is not None:
            self.context.bias.fill_(float("-inf"))
            self.context.bias[..., :length] = 0.0 if context.bias is None else context.bias
        self.filled_with = weakref.ref(context)

    def run(self, model: SanaTransformer2DModel) -> Tensor:
        # The plain class's, whatever else was put on this model.
        return SanaTransformer2DModel.forward(model, self.latent, self.timestep, self.context, self.guidance)


def _state(models: Sequence[nn.Module]) -> int:
    """Changes if a weight of the models is replaced, rather than written to, or a module gets another class."""
    addresses = (tensor.data_ptr() for tensor in all_tensors(*models))
    return hash((*addresses, *map(type, all_modules(*models))))
