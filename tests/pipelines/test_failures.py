"""Calls of the pipeline that go wrong, are watched, or run at the same time."""

import concurrent.futures
import math
import threading
import time

import numpy as np
import pytest
import torch

from sana_sprint.models.autoencoder import AutoencoderDC
from sana_sprint.models.text_encoder import PromptEncoder
from sana_sprint.pipelines.text_to_image import SanaSprintPipeline
from sana_sprint.precision import NonFiniteError
from sana_sprint.scheduler import SCMScheduler
from sana_sprint.stopping import Stopped
from tests.helpers.pipeline import LONG, PROMPT, assert_same_pictures, pixels, seeded, tiny_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


# ----- wrong arguments ------------------------------------------------------------------------------------------------

EMBEDS, MASK = torch.zeros(2, 3, 32), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either prompt or prompt_embeds; got neither"),
        ({"prompt": "a", "prompt_embeds": EMBEDS, "prompt_attention_mask": MASK}, "got both"),
        ({"prompt_embeds": EMBEDS}, "belong together"),
        ({"prompt": "a", "prompt_attention_mask": MASK}, "belong together"),
        ({"prompt_embeds": EMBEDS, "prompt_attention_mask": MASK[:1]}, r"\(2, 3, 32\) and \(1, 3\)"),
        ({"prompt": []}, "at least one string"),
        ({"prompt": 3}, "got: 3"),
        ({"prompt": ["a", None]}, "got: None"),
        ({"prompt": "a", "num_inference_steps": 0}, "from 1 to 10000, got: 0"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt .* got: 0"),
        ({"prompt": "a", "num_images_per_prompt": 1.5}, "num_images_per_prompt .* got: 1.5"),
        ({"prompt": "a", "guidance_scale": [1, 2, 3]}, "one number, one per prompt .* got: 3"),
        ({"prompt": "a", "guidance_scale": "high"}, "a number or a list of numbers, got: 'high'"),
        ({"prompt": "a", "guidance_scale": math.nan}, "finite and at least 0, got: nan"),
        ({"prompt": "a", "guidance_scale": -1}, "finite and at least 0, got: -1"),
        ({"prompt": "a", "guidance_scale": None}, "such as 4.5; got: None"),
        ({"prompt": "a", "seed": 1, "generator": seeded()}, "either seed or generator"),
        ({"prompt": "a", "seed": [1, 2]}, "one per image, 1 here"),
        ({"prompt": "a", "generator": [seeded(), seeded()]}, "one per image, 1 here; got: 2"),
        ({"prompt": "a", "latents": torch.zeros(1, 4, 8, 9)}, r"\(1, 4, 8, 8\) .* got: \(1, 4, 8, 9\)"),
        ({"prompt": "a", "height": 0}, "height must be at least 1 pixel, got: 0"),
        ({"prompt": "a", "output_type": "jpeg"}, "pil, np, pt, latent, got: 'jpeg'"),
        ({"prompt": "a", "attention_kwargs": {"scale": 0.5}}, "no LoRA is loaded"),
        ({"prompt": "a", "attention_kwargs": {"scal": 0.5}}, "'scale' only, got: scal"),
        ({"prompt": "a", "callback_on_step_end_tensor_inputs": ["latent"]}, r"latents, prompt_embeds; got: \['latent'\]"),
        ({"prompt": "a", "callback_on_step_end_tensor_inputs": "latents"}, "must be a list"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named_before_any_work(pipe, monkeypatch, arguments, message):
    def forbidden(*args, **kwargs):
        raise AssertionError("the text encoder ran")

    monkeypatch.setattr(type(pipe.prompt_encoder), "encode", forbidden)
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_eta_is_accepted_without_effect(pipe):
    assert_same_pictures(pipe(PROMPT, eta=0.7, seed=0).images, pipe(PROMPT, seed=0).images)


# ----- callbacks ------------------------------------------------------------------------------------------------------


def test_callback_sees_published_tensors_after_each_step(pipe):
    seen = []

    def callback(pipeline, i, t, tensors):
        seen.append((pipeline, i, t.item(), tensors))
        return tensors  # the published custom; must change nothing

    names = ["latents", "prompt_embeds"]
    output = pipe(
        PROMPT,
        seed=0,
        output_type="latent",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=names,
    )
    assert [(p, i) for p, i, _, _ in seen] == [(pipe, 0), (pipe, 1)]
    assert [t for _, _, t, _ in seen] == pytest.approx(output.times[:-1], abs=1e-6)  # rounded to fp32
    last = seen[-1][3]
    assert set(last) == set(names)
    torch.testing.assert_close(
        last["latents"], output.images * 0.5, atol=0, rtol=0
    )  # data space; exact by 1/2
    assert last["prompt_embeds"].shape[0] == 1
    assert torch.equal(output.images, pipe(PROMPT, seed=0, output_type="latent").images)


def test_callback_may_replace_latents_and_embeddings(pipe):
    embeds, mask = pipe.encode_prompt(LONG, num_images_per_prompt=2)
    other = torch.zeros_like(embeds)

    def swap(pipeline, i, t, tensors):
        return {"prompt_embeds": other} if i == 0 else None

    arguments = {"prompt_embeds": embeds, "prompt_attention_mask": mask, "seed": 0, "output_type": "latent"}
    swapped = pipe(
        callback_on_step_end=swap, callback_on_step_end_tensor_inputs=["prompt_embeds"], **arguments
    ).images
    assert (swapped - pipe(**arguments).images).abs().max() > 1e-2
    fixed = torch.full((2, 4, 8, 8), 0.25)
    changed = pipe(callback_on_step_end=lambda *_: {"latents": fixed}, **arguments)
    # The second of two steps begins from 0.25 in data space; its own result is what is decoded.
    alone = pipe(latents=fixed / 0.5, timesteps=changed.times[1:], **arguments)
    torch.testing.assert_close(changed.images, alone.images, atol=1e-5, rtol=0)  # fp32, the same steps


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"latent": torch.zeros(1)}, "unknown tensors: latent"),
        ({"latents": torch.zeros(1, 4, 8, 7)}, r"\(1, 4, 8, 7\)"),
    ],
)
def test_callback_with_a_wrong_answer_is_an_error(pipe, changed, message):
    with pytest.raises(ValueError, match=message):
        pipe(PROMPT, callback_on_step_end=lambda *_: changed)


def test_an_exception_of_the_callback_ends_the_call(pipe):
    steps = []

    def stop(pipeline, i, t, tensors):
        steps.append(i)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(PROMPT, 4, callback_on_step_end=stop)
    assert steps == [0]


# ----- numbers that go wrong ------------------------------------------------------------------------------------------


def break_weights(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        next(module.parameters()).fill_(math.nan)
    return module


@pytest.mark.parametrize(
    ("part", "stage"),
    [
        (lambda pipe: pipe.text_encoder, "the text encoder gave"),
        (lambda pipe: pipe.transformer.proj_out, "step 1 of 2 gave"),
        (lambda pipe: pipe.vae.decoder, "the autoencoder's decoder gave"),
    ],
)
def test_nan_names_the_stage_instead_of_a_black_picture(part, stage):
    """The published pipeline casts NaN to bytes and returns a black picture."""
    broken = tiny_pipeline()
    break_weights(part(broken))
    with pytest.raises(NonFiniteError, match=stage):
        broken(PROMPT)


@pytest.mark.parametrize("name", ["latents", "prompt_embeds"])
def test_nan_of_the_caller_is_named(pipe, name):
    embeds, mask = pipe.encode_prompt(PROMPT)
    arguments = {"prompt_embeds": embeds, "latents": torch.zeros(1, 4, 8, 8)}
    arguments[name] = torch.full_like(arguments[name], math.nan)
    with pytest.raises(NonFiniteError, match=name):
        pipe(prompt_attention_mask=mask, **arguments)


def oom(
    message: str = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
) -> RuntimeError:
    return RuntimeError(message)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), oom(), oom("MPS backend out of memory"), MemoryError()],
)
def test_decoding_that_runs_out_of_memory_is_retried_in_tiles(pipe, monkeypatch, caplog, error):
    """The published pipeline warns, then fails on a variable that was never set."""
    tiles = []
    decode = AutoencoderDC.decode

    def hungry(self, latent, **settings):
        tiles.append((self.use_slicing, None if self.tiling is None else self.tiling.tile))
        if self.tiling is None:
            raise error
        return decode(self, latent, **settings)

    expected = pipe(PROMPT, num_images_per_prompt=2, seed=0).images
    monkeypatch.setattr(AutoencoderDC, "decode", hungry)
    output = pipe(PROMPT, num_images_per_prompt=2, seed=0)
    assert tiles == [(False, None), (True, (4, 4))]
    assert "in tiles" in caplog.text
    assert (pipe.vae.use_slicing, pipe.vae.tiling) == (False, None)  # this call's remedy only
    # Tiles see less of the picture, so values move; unrelated pictures differ by about 50 on average.
    assert np.abs(pixels(output.images) - pixels(expected)).mean() < 20


@pytest.mark.parametrize("evaluations", [0, 1])
def test_a_call_is_stopped_between_steps(pipe, evaluations):
    steps = []
    with pytest.raises(Stopped):
        pipe(
            PROMPT,
            callback_on_step_end=lambda pipe, i, t, tensors: steps.append(i),
            should_stop=lambda: len(steps) >= evaluations,
        )
    assert len(steps) == evaluations


def test_a_call_is_stopped_between_tiles():
    pipe, asked = tiny_pipeline(), []
    pipe.enable_vae_tiling(tile_size=16, overlap=8)

    def after_three() -> bool:
        asked.append(1)
        return len(asked) > 3  # asked before the one step, and before each of nine tiles

    with pytest.raises(Stopped):
        pipe(PROMPT, num_inference_steps=1, should_stop=after_three)
    assert len(asked) == 4


def test_decoding_that_never_fits_is_a_clear_error(pipe, monkeypatch):
    def starving(self, latent, **settings):
        raise oom()

    monkeypatch.setattr(AutoencoderDC, "decode", starving)
    with pytest.raises(MemoryError, match="decode 1 pictures of 32x32, not even one by one in tiles"):
        pipe(PROMPT)


def test_other_errors_of_the_decoder_are_not_mistaken_for_memory(pipe, monkeypatch):
    def faulty(self, latent, **settings):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(AutoencoderDC, "decode", faulty)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        pipe(PROMPT)


# ----- shared between threads -----------------------------------------------------------------------------------------


def test_two_threads_at_once_get_what_each_gets_alone():
    """Published pipelines keep a call's state in the scheduler and themselves, and tokenizers cannot be shared."""
    shared = tiny_pipeline()
    calls = [
        {"prompt": PROMPT, "num_inference_steps": 2, "seed": 1},
        {"prompt": [LONG, PROMPT], "num_inference_steps": 4, "seed": 2, "guidance_scale": 2.0, "height": 48},
        {"prompt": LONG, "num_inference_steps": 3, "seed": 3, "max_sequence_length": 5},  # truncates while others do not
        {"prompt": PROMPT, "num_inference_steps": 1, "seed": 4, "complex_human_instruction": ["Draw: "]},
    ]  # fmt: skip
    alone = [shared(**call) for call in calls]
    start = threading.Barrier(len(calls))

    def run(call):
        start.wait()
        return [shared(**call) for _ in range(3)]

    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        for expected, found in zip(alone, pool.map(run, calls), strict=True):
            for output in found:
                assert_same_pictures(output.images, expected.images)
                assert (output.times, output.height) == (expected.times, expected.height)


def test_pipelines_that_share_a_tokenizer_take_turns_with_it(monkeypatch):
    """A tokenizer that is busy in one thread fails in another ("Already borrowed")."""
    pipe = tiny_pipeline()
    busy, overlaps = threading.Lock(), []
    encode = PromptEncoder.encode

    def watched(self, *args, **kwargs):
        overlaps.append(not busy.acquire(blocking=False))
        time.sleep(0.05)  # long enough for the others to arrive
        if not overlaps[-1]:
            busy.release()
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(PromptEncoder, "encode", watched)
    pipes = [pipe, SanaSprintPipeline.from_pipe(pipe), SanaSprintPipeline(**pipe.components)]
    with concurrent.futures.ThreadPoolExecutor(len(pipes)) as pool:
        list(pool.map(lambda one: one.encode_prompt(PROMPT), pipes))
    assert overlaps == [False] * 3


def test_a_call_changes_nothing_about_the_pipeline_but_the_numbers_of_the_last_call():
    pipe = tiny_pipeline()
    pipe.prompt_encoder  # noqa: B018  (made when first used)
    pipe(PROMPT, 2, guidance_scale=3.0, seed=0)
    before = dict(vars(pipe))
    scheduler = dict(vars(pipe.scheduler))
    pipe(PROMPT, 4, guidance_scale=2.0, seed=0)
    after = dict(vars(pipe))
    changed = {name for name, value in before.items() if after[name] is not value}
    assert (changed, pipe.guidance_scale, pipe.num_timesteps) == ({"_last_call"}, 2.0, 4)
    assert vars(pipe.scheduler) == scheduler
    assert isinstance(pipe.scheduler, SCMScheduler)


# ----- progress -------------------------------------------------------------------------------------------------------


def test_progress_shows_on_stderr_when_asked(capfd):
    pipe = tiny_pipeline()
    pipe(PROMPT, 3, seed=0)  # stderr is no terminal here
    assert capfd.readouterr() == ("", "")
    pipe.set_progress_bar_config(disable=False)
    pipe(PROMPT, 3, seed=0)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "3/3" in captured.err
