"""Recorded steps, with a stand-in for CUDA graphs that runs the function again into the same output."""

import copy
import gc
import weakref

import pytest
import torch

from sana_sprint import backends
from sana_sprint.backends.cuda.graphs import TOKENS, CallGraphs, StepGraphs
from sana_sprint.backends.cuda.recorded import padded
from sana_sprint.models.controlnet import SanaControlNetModel
from sana_sprint.models.transformer import SanaTransformer2DModel, TransformerConfig
from sana_sprint.pipelines.text_to_image import SanaSprintPipeline
from tests.helpers.graphs import FakeRecorder
from tests.helpers.models import TRANSFORMERS, randomize


@pytest.fixture
def model():
    model = SanaTransformer2DModel(TransformerConfig(**{**TRANSFORMERS["sprint"], "num_layers": 2}))
    randomize(model)
    return model.eval()


def record(model, limit=8):
    """Graphs for a model, and what counts its recordings."""
    recorder = FakeRecorder()
    backends.record(model, StepGraphs(limit, record=recorder, device_type="cpu"))
    return recorder


def evaluate(model, *arguments):
    """The plain model's result."""
    return SanaTransformer2DModel.forward(model, *arguments)


def inputs(model, batch=1, tokens=3, side=3, mask=None):
    latent = torch.randn(batch, 4, side, side)
    text = torch.randn(batch, tokens, 10)
    context = SanaTransformer2DModel.encode_caption(model, text, mask)
    return latent, torch.rand(batch), context, 4.5 + torch.rand(batch)


@torch.no_grad()
def test_recorded_steps_are_the_steps(model):
    recorder = record(model)
    partly = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]])
    calls = [
        inputs(model),
        inputs(model, tokens=5),  # longer, the same bucket
        inputs(model, tokens=2),  # shorter: what the longer one left behind must not count
        inputs(model, tokens=TOKENS),  # no padding, no bias
        inputs(model, tokens=TOKENS + 1),
        inputs(model, batch=2, tokens=5, mask=partly),
        inputs(model, batch=2, tokens=5, mask=torch.zeros(2, 5)),  # all masked: attends to them evenly
        inputs(model, side=2),
    ]
    for arguments in calls + calls[::-1]:
        # Softmax over padding of weight 0 adds the same numbers in other groups: a few units of fp32 rounding.
        torch.testing.assert_close(model(*arguments), evaluate(model, *arguments), rtol=1e-5, atol=1e-5)
    assert recorder.recorded == len(backends.recordings(model)) == 5


@torch.no_grad()
def test_one_context_in_turn_with_others(model):
    recorder = record(model)
    first, second = inputs(model), inputs(model)
    later = (torch.randn_like(first[0]), torch.rand(1), *first[2:])  # a second step: other noise and time
    outputs = [model(*arguments) for arguments in (first, later, second, later)]
    assert torch.equal(outputs[1], outputs[3])  # a copy, which a later call does not write to
    for out, arguments in zip(outputs, (first, later, second, later), strict=True):
        torch.testing.assert_close(out, evaluate(model, *arguments), rtol=1e-5, atol=1e-5)
    assert recorder.recorded == 1


@torch.no_grad()
def test_recorded_captions_are_the_captions(model):
    arguments = inputs(model)
    calls = [
        (torch.randn(1, 3, 10), None),
        (torch.randn(1, 5, 10), torch.tensor([[1, 1, 0, 1, 1]])),  # the same bucket
        (torch.randn(2, 2, 10), torch.tensor([[1, 0], [1, 1]])),
        (torch.randn(1, TOKENS, 10), None),
    ]
    contexts = [model.encode_caption(*call) for call in calls]
    recorder = record(model)
    for call, context in [*zip(calls, contexts, strict=True)] * 2:
        recorded, expected = model.encode_caption(*call), padded(context, TOKENS)
        length = call[0].shape[1]
        for one, other in zip(
            (*recorded.keys, *recorded.values), (*expected.keys, *expected.values), strict=True
        ):
            torch.testing.assert_close(one[:, :, :length], other[:, :, :length])
        assert torch.equal(recorded.bias, expected.bias)
        if len(call[0]) == 1:
            out = model(*arguments[:2], recorded, arguments[3])
            reference = evaluate(model, *arguments[:2], context, arguments[3])
            torch.testing.assert_close(out, reference, rtol=1e-5, atol=1e-5)
    # Captions of one and of two, and steps. All captions have a bias, so there is one step.
    assert recorder.recorded == 3


@torch.no_grad()
def test_captions_are_not_kept_alive(model):
    record(model)
    arguments = inputs(model)
    model(*arguments)
    context = weakref.ref(arguments[2])
    del arguments
    gc.collect()
    assert context() is None


@torch.no_grad()
def test_the_graph_unused_for_longest_makes_room(model):
    recorder = record(model, limit=2)
    a, b, c = (inputs(model, side=side) for side in (1, 2, 3))
    for arguments in (a, b, a, c, a):
        model(*arguments)
    assert (recorder.recorded, len(backends.recordings(model))) == (3, 2)
    model(*b)
    assert recorder.recorded == 4


@torch.no_grad()
def test_other_weights_are_recorded_anew(model):
    recorder = record(model)
    arguments = inputs(model)
    model(*arguments)
    model.proj_out.bias.add_(1)  # written to in place: a graph reads it from there
    torch.testing.assert_close(model(*arguments), evaluate(model, *arguments), rtol=1e-5, atol=1e-5)
    assert recorder.recorded == 1
    model.proj_out.weight = torch.nn.Parameter(2 * model.proj_out.weight)
    torch.testing.assert_close(model(*arguments), evaluate(model, *arguments), rtol=1e-5, atol=1e-5)
    assert recorder.recorded == 2


def test_where_graphs_do_not_apply_the_step_runs_as_always(model):
    recorder = record(model)
    arguments = inputs(model)
    model(*arguments).sum().backward()  # under grad
    with torch.no_grad():
        arguments = inputs(model)
        model(*arguments, control=lambda x, modulation: {})
        model.train()
        model(*arguments)
        backends.record(model.eval(), StepGraphs())  # for CUDA
        model(*arguments)
    assert recorder.recorded == 0


def test_a_copied_model_has_graphs_of_its_own(model):
    backends.record(model, StepGraphs(3))
    other = copy.deepcopy(model)
    own, others = backends.recordings(model), backends.recordings(other)
    assert (others is own, others.limit) == (False, 3)
    backends.record(model, None)
    assert type(model) is SanaTransformer2DModel
    assert backends.recordings(other) is others


@torch.no_grad()
def test_steps_that_follow_a_picture_are_recorded(model):
    branch = SanaControlNetModel.from_transformer(model, num_layers=1)
    randomize(branch, seed=4)
    calls = [inputs(model), inputs(model, tokens=5), inputs(model, batch=2)]
    contexts = [
        branch.encode(model, torch.randn_like(call[0]), torch.randn(len(call[0]), 4, 10)) for call in calls
    ]

    def draw(call, context, scale):
        latent, timestep, _, guidance = call
        return model(*call, branch.steer(latent, timestep, context, guidance, scale))

    expected = [draw(call, context, 0.5) for call, context in zip(calls, contexts, strict=True)]
    record(model)
    recorder = FakeRecorder()
    backends.record(branch, CallGraphs(record=recorder, device_type="cpu"))
    for call, context, velocity in [*zip(calls, contexts, expected, strict=True)] * 2:
        torch.testing.assert_close(draw(call, context, 0.5), velocity, rtol=1e-5, atol=1e-5)
    assert recorder.recorded == 2  # batches of one and of two
    draw(calls[0], contexts[0], 0.25)
    assert recorder.recorded == 3


def test_switches_of_the_pipeline(model):
    pipe = SanaSprintPipeline(None, None, None, model, None)
    pipe.enable_cuda_graphs(limit=2)
    assert backends.recordings(model).limit == 2
    pipe.enable_cuda_graphs(False)
    pipe.enable_fused_kernels(False)
    assert backends.recordings(model) is None
    with pytest.raises(ValueError, match="got: 0"):
        pipe.enable_cuda_graphs(limit=0)
    with pytest.raises(ValueError, match="without transformer"):
        SanaSprintPipeline(None, None, None, None, None).enable_cuda_graphs()
