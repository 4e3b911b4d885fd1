"""Recorded calls of text encoder, autoencoder and control branch, with a stand-in for CUDA graphs."""

import copy

import pytest
import torch
from PIL import Image, ImageDraw

from sana_sprint import SanaSprintControlNetPipeline, backends
from sana_sprint.backends.cuda.graphs import TOKENS, CallGraphs, StepGraphs
from sana_sprint.models.controlnet import SanaControlNetModel
from sana_sprint.pipelines.control import ControlInput
from sana_sprint.pipelines.denoise import Conditioning
from sana_sprint.pipelines.inputs import Plan
from sana_sprint.pipelines.text import Prompts
from sana_sprint.prompts import COMPLEX_HUMAN_INSTRUCTION
from sana_sprint.resolutions import Size
from tests.helpers.graphs import FakeRecorder
from tests.helpers.models import randomize
from tests.helpers.pipeline import LONG, PROMPT, tiny_pipeline

INSTRUCTION = [COMPLEX_HUMAN_INSTRUCTION[0]]


def graphs(limit=8):
    recorder = FakeRecorder()
    return CallGraphs(limit, record=recorder, device_type="cpu"), recorder


def record(model):
    """Graphs for a model; returns what counts its recordings."""
    calls, recorder = graphs()
    backends.record(model, calls)
    return recorder


def sketch(where=8):
    picture = Image.new("RGB", (32, 32), "white")
    ImageDraw.Draw(picture).rectangle((where, 6, where + 12, 24), outline="black", width=2)
    return picture


@pytest.fixture
def pipe():
    text = tiny_pipeline()
    branch = SanaControlNetModel.from_transformer(text.transformer, num_layers=2)
    randomize(branch, seed=4)
    return SanaSprintControlNetPipeline.from_pipe(text, controlnet=branch.eval())


def test_pictures_of_recorded_calls_are_the_pictures(pipe):
    calls = [
        {"prompt": PROMPT, "image": sketch()},
        {"prompt": LONG, "image": sketch(16)},  # more tokens, the same bucket
        {"prompt": [PROMPT, LONG], "image": sketch()},
        {"prompt": PROMPT, "image": sketch(), "controlnet_conditioning_scale": 0.5},
        {"prompt": PROMPT, "image": sketch(), "num_inference_steps": 3, "control_guidance_end": 0.5},
    ]

    def draw(call):
        return pipe(
            seed=1, kind="scribble", output_type="pt", complex_human_instruction=INSTRUCTION, **call
        ).images

    expected = [draw(call) for call in calls]
    recorders = {}
    for name in ("text_encoder", "vae", "controlnet"):
        recorders[name] = record(getattr(pipe, name))
    backends.record(pipe.transformer, StepGraphs(record=FakeRecorder(), device_type="cpu"))
    for call, pictures in [*zip(calls, expected, strict=True)] * 2:
        torch.testing.assert_close(draw(call), pictures, rtol=1e-4, atol=1e-4)
    # Batches of one and of two, each: prompts; encoding (one sketch always) and decoding; captions, and steps at two
    # strengths.
    assert {name: recorder.recorded for name, recorder in recorders.items()} == {
        "text_encoder": 2,
        "vae": 3,
        "controlnet": 5,
    }


@torch.no_grad()
def test_steps_with_several_branches_are_recorded_as_one(pipe):
    """Two branches of different form and depth: one recording serves other pictures, scales make another."""
    transformer, official = (
        pipe.transformer,
        SanaControlNetModel.from_transformer(pipe.transformer, num_layers=1, topology="official"),
    )
    randomize(official, seed=5)
    text = Prompts(PROMPT).encode(pipe.prompt_encoder, False, 300, None)
    plan = Plan(num_prompts=1, repeats=1, size=Size(32, 32, 32, 32), times=(1.5, 0.0))
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def controls(conditioning, where, scale):
        return tuple(
            ControlInput(
                controlnet=branch,
                vae=pipe.vae,
                pictures=(sketch(where + shift),),
                kind="scribble",
                thickness=None,
                scale=scale,
                start=0.0,
                end=1.0,
            )
            .prepare(plan)
            .encode(conditioning, 1)
            for branch, shift in ((pipe.controlnet, 0), (official.eval(), 6))
        )

    def velocity(where, scale):
        conditioning = Conditioning.of(transformer, text, 1, (4.5,))
        conditioning.controls = controls(conditioning, where, scale)
        return conditioning.velocity(x, torch.tensor([0.8]), 0)

    calls = [(2, 1.0), (10, 1.0), (2, 0.5)]
    expected = [velocity(*call) for call in calls]
    assert (expected[0] - expected[1]).abs().max() > 1e-2  # so that a picture of another call would show
    recorder = record(pipe.controlnet)
    backends.record(transformer, StepGraphs(record=FakeRecorder(), device_type="cpu"))
    for call, velocities in [*zip(calls, expected, strict=True)] * 2:
        torch.testing.assert_close(velocity(*call), velocities, rtol=1e-4, atol=1e-4)
    assert recorder.recorded == 3  # captions, and steps at two scales


@torch.no_grad()
def test_prompts_of_other_instructions_are_recorded_anew(pipe):
    encoder = pipe.prompt_encoder
    others = [*INSTRUCTION, "more"]

    def embeds(instruction):
        return encoder.encode([PROMPT], complex_human_instruction=instruction).embeds

    expected = [embeds(instruction) for instruction in (INSTRUCTION, others)]
    recorder = record(pipe.text_encoder)
    for instruction, reference in zip((INSTRUCTION, others), expected, strict=True):
        torch.testing.assert_close(embeds(instruction), reference, rtol=1e-5, atol=1e-5)
    assert recorder.recorded == 2
    with torch.no_grad():
        for parameter in pipe.text_encoder.parameters():
            parameter.mul_(1.1)  # the instruction's keys are made again
    fresh = copy.deepcopy(pipe.text_encoder)
    encoder.text_encoder = fresh
    reference = embeds(INSTRUCTION)
    encoder.text_encoder = pipe.text_encoder
    torch.testing.assert_close(embeds(INSTRUCTION), reference, rtol=1e-5, atol=1e-5)
    assert recorder.recorded == 3


@torch.no_grad()
def test_large_pictures_and_gradients_run_as_always(pipe, monkeypatch):
    recorder = record(pipe.vae)
    latent = torch.randn(1, pipe.vae.config.latent_channels, 4, 4)
    with torch.enable_grad():
        pipe.vae.decode(latent)
    monkeypatch.setattr("sana_sprint.backends.cuda.recorded.LARGEST_RECORDED", 255)
    pipe.vae.decode(latent)
    assert recorder.recorded == 0
    pipe.vae.decode(latent[:, :, :2])
    assert recorder.recorded == 1


def test_the_least_used_call_makes_room():
    model = torch.nn.Linear(2, 2).eval()
    calls, recorder = graphs(limit=1)
    with torch.no_grad():
        for rows in (1, 2, 1):
            x = torch.randn(rows, 2)
            torch.testing.assert_close(calls(None, (model,), model, x), model(x))
    assert (recorder.recorded, len(calls)) == (3, 1)
    assert (CallGraphs.bucket(1), CallGraphs.bucket(TOKENS + 1)) == (TOKENS, 2 * TOKENS)


def test_the_switch_of_the_pipeline(pipe):
    pipe.enable_cuda_graphs(limit=2)
    models = (pipe.text_encoder, pipe.vae, pipe.controlnet)
    assert [backends.recordings(model).limit for model in models] == [2, 2, 2]
    pipe.enable_cuda_graphs(False)
    assert [backends.recordings(model) for model in models] == [None, None, None]
