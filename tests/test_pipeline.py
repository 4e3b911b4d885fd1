"""What a call of the pipeline does. Numbers against the published pipeline are in test_pipeline_parity.py."""

import concurrent.futures
import logging
import math
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from sana_sprint.models.autoencoder import AutoencoderDC
from sana_sprint.models.transformer import SanaTransformer2DModel
from sana_sprint.numerics import NonFiniteError
from sana_sprint.pipelines.output import SanaSprintOutput
from sana_sprint.sampling import SCMScheduler, schedule
from tests._pipeline import TRANSFORMER, pixels, tiny_pipeline

PROMPT = "a red cat on the moon"
LONG = "the tiny astronaut in a photo of dogs"  # more tokens than PROMPT: rows of a batch get padding


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same_pictures(found, expected) -> None:
    """Equal up to one level: a batch sums in another order than a single picture, which can tip a rounding."""
    assert np.abs(pixels(found) - pixels(expected)).max() <= 1


def assert_other_pictures(found, expected) -> None:
    assert (
        np.abs(pixels(found) - pixels(expected)).mean() > 1
    )  # of 255; unrelated pictures differ by about 50


# ----- steps and times ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_every_number_of_steps_works_with_the_defaults(pipe, steps):
    """The published pipeline raises for 1, 3 and 4 steps unless intermediate_timesteps=None is passed."""
    output = pipe(PROMPT, steps, seed=0)
    assert output.num_inference_steps == steps
    assert output.times == tuple(schedule(steps, max_timesteps=1.57080))
    assert pixels(output.images).std() > 20  # of 255; a flat picture would have 0


def test_custom_times_work_and_decide_the_number_of_steps(pipe):
    """The published pipeline cannot be given `timesteps` at all (TypeError)."""
    times = [1.5683, 1.3, 1.1, 0.6, 0.0]
    output = pipe(PROMPT, timesteps=times, seed=0)
    assert output.times == tuple(times)
    assert_same_pictures(pipe(PROMPT, 4, max_timesteps=1.5683, seed=0).images, output.images)


def test_first_and_middle_time_reach_the_sampler(pipe):
    assert pipe(PROMPT, max_timesteps=1.5, intermediate_timesteps=1.1, seed=0).times == (1.5, 1.1, 0.0)


# ----- prompts and batches --------------------------------------------------------------------------------------------


def test_a_batch_of_prompts_and_images_equals_singles(pipe):
    """The published pipeline pairs the embeddings of prompt 0 with the mask of prompt 1."""
    together = pipe([PROMPT, LONG], num_images_per_prompt=2, seed=7)
    assert together.seeds == (7, 8, 9, 10)
    for i, prompt in enumerate([PROMPT, PROMPT, LONG, LONG]):
        alone = pipe(prompt, seed=7 + i)
        assert_same_pictures(alone.images, together.images[i : i + 1])
    assert_other_pictures(together.images[0], together.images[1])
    assert_other_pictures(pipe(PROMPT, seed=7).images, pipe(LONG, seed=7).images)


def test_captions_are_projected_once_per_call(pipe, monkeypatch):
    calls = []
    encode = SanaTransformer2DModel.encode_caption

    def counted(self, text, mask=None):
        calls.append(text.shape[0])
        return encode(self, text, mask)

    monkeypatch.setattr(SanaTransformer2DModel, "encode_caption", counted)
    pipe([PROMPT, LONG], 4, num_images_per_prompt=3, seed=0)
    assert calls == [2]


def test_embeddings_can_replace_the_prompt(pipe):
    embeds, mask = pipe.encode_prompt([PROMPT, LONG], complex_human_instruction=["Describe: "])
    assert mask.dtype == torch.bool
    assert embeds.shape[:2] == mask.shape
    from_embeds = pipe(prompt_embeds=embeds, prompt_attention_mask=mask, seed=3)
    from_text = pipe([PROMPT, LONG], complex_human_instruction=["Describe: "], seed=3)
    assert_same_pictures(from_embeds.images, from_text.images)
    # What is masked does not count, as with the published padding to 300 tokens.
    padded = torch.cat([embeds, torch.ones(2, 5, embeds.shape[-1])], dim=1)
    longer = torch.cat([mask, torch.zeros(2, 5, dtype=torch.bool)], dim=1).long()
    padded_images = pipe(prompt_embeds=padded, prompt_attention_mask=longer, seed=3).images
    assert_same_pictures(padded_images, from_text.images)


def test_encode_prompt_repeats_embeddings_and_mask_alike(pipe):
    embeds, mask = pipe.encode_prompt([PROMPT, LONG], num_images_per_prompt=2)
    once, mask_once = pipe.encode_prompt([PROMPT, LONG])
    assert torch.equal(embeds, once[[0, 0, 1, 1]])
    assert torch.equal(mask, mask_once[[0, 0, 1, 1]])
    assert mask_once.sum(1).unique().numel() == 2  # the masks differ, so a wrong order would show


def test_the_instruction_and_cleaning_reach_the_encoder(pipe):
    plain = pipe(PROMPT, seed=0).images
    assert_other_pictures(pipe(PROMPT, complex_human_instruction=None, seed=0).images, plain)
    assert_same_pictures(pipe(f"{PROMPT} http://a.com/b", clean_caption=True, seed=0).images, plain)


def test_an_empty_prompt_is_allowed(pipe):
    assert_other_pictures(pipe("", seed=0).images, pipe(PROMPT, seed=0).images)


def test_a_truncated_prompt_is_reported(pipe, caplog):
    """The published pipeline cuts prompts without a word."""
    with caplog.at_level(logging.WARNING, logger="sana_sprint"):
        output = pipe(["cat", LONG], max_sequence_length=4, seed=0)
    assert output.truncated == (False, True)
    assert output.lost_tokens[0] == 0 < output.lost_tokens[1]
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == f"prompt 2 of 2 is too long: its last {output.lost_tokens[1]} tokens are not used"


# ----- guidance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (3.0, (3, 3, 3, 3)),
        ([3.0], (3, 3, 3, 3)),
        ([2, 5], (2, 2, 5, 5)),
        (torch.tensor([1.0, 2, 3, 4]), (1, 2, 3, 4)),
    ],
)
def test_guidance_per_call_prompt_or_image(pipe, scale, expected):
    """The published pipeline takes one number for the whole batch."""
    output = pipe([PROMPT, LONG], num_images_per_prompt=2, guidance_scale=scale, seed=0)
    assert output.guidance == expected
    alone = pipe(LONG, guidance_scale=expected[3], seed=3)
    assert_same_pictures(alone.images, output.images[3:])


def test_guidance_changes_the_picture(pipe):
    low, high = (
        pipe(PROMPT, guidance_scale=scale, output_type="latent", seed=0).images for scale in (1.0, 5.0)
    )
    assert (low - high).abs().max() > 1e-2  # unit-variance latents; equal ones would differ by 0


def test_guidance_stays_in_full_precision(pipe, monkeypatch):
    """The published pipeline rounds it to bf16, where 4.6 times 0.1 becomes 0.4590 instead of 0.46."""
    seen = []
    forward = SanaTransformer2DModel.forward

    def spy(self, hidden_states, timestep, context, guidance=None):
        seen.append((hidden_states.dtype, timestep.dtype, guidance))
        return forward(self, hidden_states, timestep, context, guidance)

    monkeypatch.setattr(SanaTransformer2DModel, "forward", spy)
    low = tiny_pipeline().to(torch.bfloat16)
    assert low(PROMPT, guidance_scale=4.6, seed=0).dtype == "bfloat16"
    for latent_dtype, time_dtype, guidance in seen:
        assert (latent_dtype, time_dtype, guidance.dtype) == (torch.float32,) * 3
        assert guidance.tolist() == pytest.approx([4.6], rel=1e-7)


def test_guidance_for_a_model_without_it_is_an_error():
    plain = tiny_pipeline({**TRANSFORMER, "guidance_embeds": False})
    with pytest.raises(ValueError, match="pass None"):
        plain(PROMPT)
    assert plain(PROMPT, guidance_scale=None, seed=0).guidance is None


# ----- seeds, generators, latents -------------------------------------------------------------------------------------


def test_seeds_are_reported_and_make_the_picture_again(pipe):
    output = pipe(PROMPT, num_images_per_prompt=2)
    assert len(set(output.seeds)) == 2
    for seed, image in zip(output.seeds, output.images, strict=True):
        assert_same_pictures(pipe(PROMPT, seed=seed).images, image)
    assert pipe(PROMPT).seeds != output.seeds
    listed = pipe(PROMPT, num_images_per_prompt=2, seed=[5, 99])
    assert listed.seeds == (5, 99)
    assert_same_pictures(pipe(PROMPT, seed=99).images, listed.images[1])


def test_a_generator_per_image_equals_its_seed(pipe):
    generators = [seeded(5), seeded(6)]
    output = pipe(PROMPT, num_images_per_prompt=2, generator=generators)
    assert output.seeds is None
    assert_same_pictures(output.images, pipe(PROMPT, num_images_per_prompt=2, seed=5).images)


@pytest.mark.parametrize(("steps", "draws"), [(1, 1), (2, 2), (4, 4)])
def test_no_noise_is_drawn_after_the_last_step(pipe, steps, draws):
    """The published scheduler draws once more, which only moves the generator on."""
    generator, expected = seeded(), seeded()
    pipe(PROMPT, steps, generator=generator)
    for _ in range(draws):
        torch.randn(1, 4, 8, 8, generator=expected)
    assert torch.equal(generator.get_state(), expected.get_state())


def test_the_global_generator_is_left_alone(pipe):
    state = torch.get_rng_state()
    pipe(PROMPT)
    assert torch.equal(torch.get_rng_state(), state)


def test_latents_are_unit_noise(pipe):
    """As published: what the pipeline would have drawn itself can be passed in."""
    noise = torch.randn(1, 4, 8, 8, generator=seeded(4))
    assert_same_pictures(pipe(PROMPT, 1, latents=noise).images, pipe(PROMPT, 1, seed=4).images)
    kept = noise.clone()
    pipe(PROMPT, 2, latents=noise, seed=0)
    assert torch.equal(noise, kept)


# ----- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(48, 32), (41, 30), (20, 80), (7, 7), (64, 48), (33, 100)])
def test_any_size_comes_out_as_asked(pipe, width, height):
    """The published arithmetic lands one pixel short for some sizes, and refuses models of another native size."""
    output = pipe(PROMPT, 1, width=width, height=height, seed=0)
    assert output.images[0].size == (output.width, output.height) == (width, height)
    assert output.model_height % 4 == output.model_width % 4 == 0
    assert 0.5 < output.model_height * output.model_width / 32**2 < 1.5  # near the native number of pixels


def test_without_binning_the_model_draws_the_size_itself(pipe):
    output = pipe(PROMPT, 1, width=52, height=12, use_resolution_binning=False, seed=0)
    assert output.images[0].size == (52, 12) == (output.model_width, output.model_height)
    with pytest.raises(ValueError, match=r"width must be a multiple of 4 .* got: 50"):
        pipe(PROMPT, 1, width=50, height=12, use_resolution_binning=False)


def test_the_size_defaults_to_the_native_one(pipe):
    output = pipe(PROMPT, 1, seed=0)
    assert (output.height, output.width, output.model_height, output.model_width) == (32, 32, 32, 32)


# ----- outputs --------------------------------------------------------------------------------------------------------


def test_output_types_show_the_same_picture(pipe):
    outputs = {kind: pipe(PROMPT, seed=0, output_type=kind).images for kind in ("pil", "np", "pt", "latent")}
    assert isinstance(outputs["pil"][0], Image.Image)
    assert (outputs["np"].dtype, outputs["np"].shape) == (np.float32, (1, 32, 32, 3))
    assert (outputs["pt"].dtype, outputs["pt"].shape) == (torch.float32, (1, 3, 32, 32))
    assert np.array_equal(outputs["pt"].permute(0, 2, 3, 1).numpy(), outputs["np"])
    assert np.abs(outputs["np"] * 255 - pixels(outputs["pil"])).max() <= 0.501  # rounding to whole levels
    assert outputs["latent"].shape == (1, 4, 8, 8)
    decoded = pipe.vae.decode(outputs["latent"] / pipe.vae.config.scaling_factor)
    torch.testing.assert_close(
        decoded.clamp(-1, 1) / 2 + 0.5, outputs["pt"], atol=1e-6, rtol=0
    )  # fp32 rounding


def test_output_can_be_taken_apart_as_published(pipe):
    output = pipe(PROMPT, seed=0)
    assert isinstance(output, SanaSprintOutput)
    assert output[0] is output["images"] is output.images
    with pytest.raises(KeyError, match="'latents'"):
        output["latents"]
    (images,) = pipe(PROMPT, seed=0, return_dict=False)
    assert_same_pictures(images, output.images)


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
        ({"prompt": "a", "num_inference_steps": 0}, "at least 1, got: 0"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt .* got: 0"),
        ({"prompt": "a", "num_images_per_prompt": 1.5}, "num_images_per_prompt .* got: 1.5"),
        ({"prompt": "a", "guidance_scale": [1, 2, 3]}, "one number, one per prompt .* got: 3"),
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
    fixed = pipe(
        callback_on_step_end=lambda *_: {"latents": torch.full((2, 4, 8, 8), 0.25)}, **arguments
    ).images
    assert torch.equal(fixed, torch.full((2, 4, 8, 8), 0.5))  # 0.25 in data space


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

    def hungry(self, latent):
        tiles.append((self.use_slicing, None if self.tiling is None else self.tiling.tile))
        if self.tiling is None:
            raise error
        return decode(self, latent)

    expected = pipe(PROMPT, num_images_per_prompt=2, seed=0).images
    monkeypatch.setattr(AutoencoderDC, "decode", hungry)
    output = pipe(PROMPT, num_images_per_prompt=2, seed=0)
    assert tiles == [(False, None), (True, (4, 4))]
    assert "in tiles" in caplog.text
    assert (pipe.vae.use_slicing, pipe.vae.tiling) == (False, None)  # this call's remedy only
    # Tiles see less of the picture, so values move; unrelated pictures differ by about 50 on average.
    assert np.abs(pixels(output.images) - pixels(expected)).mean() < 20


def test_decoding_that_never_fits_is_a_clear_error(pipe, monkeypatch):
    def starving(self, latent):
        raise oom()

    monkeypatch.setattr(AutoencoderDC, "decode", starving)
    with pytest.raises(MemoryError, match="decode 1 pictures of 32x32, not even one by one in tiles"):
        pipe(PROMPT)


def test_other_errors_of_the_decoder_are_not_mistaken_for_memory(pipe, monkeypatch):
    def faulty(self, latent):
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


def test_a_call_changes_nothing_about_the_pipeline():
    pipe = tiny_pipeline()
    pipe.prompt_encoder  # noqa: B018  (made when first used)
    before = dict(vars(pipe))
    scheduler = dict(vars(pipe.scheduler))
    pipe(PROMPT, 4, guidance_scale=2.0, seed=0)
    assert vars(pipe) == before
    assert vars(pipe.scheduler) == scheduler
    assert isinstance(pipe.scheduler, SCMScheduler)
    assert not any(parameter.grad_fn for parameter in pipe.transformer.parameters())


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
