"""Calls of the pipeline. Numbers against the published pipeline are in test_parity.py."""

import inspect
import logging

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from sana_sprint import SanaSprintControlNetPipeline, SanaSprintPipeline
from sana_sprint.models.transformer import SanaTransformer2DModel
from sana_sprint.pipelines.output import SanaSprintOutput
from sana_sprint.sampling import schedule
from tests.helpers.pipeline import (
    LONG,
    PROMPT,
    TRANSFORMER,
    assert_other_pictures,
    assert_same_pictures,
    pixels,
    seeded,
    tiny_pipeline,
)
from tests.helpers.text import FP32_ATOL


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


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
    assert embeds.shape[:2] == mask.shape == (2, 300)
    from_embeds = pipe(prompt_embeds=embeds, prompt_attention_mask=mask, seed=3)
    from_text = pipe([PROMPT, LONG], complex_human_instruction=["Describe: "], seed=3)
    assert_same_pictures(from_embeds.images, from_text.images)
    # What is masked does not count, and masks may be of any number type.
    noisy = torch.where(mask[..., None] == 1, embeds, torch.ones_like(embeds))
    noisy_images = pipe(prompt_embeds=noisy, prompt_attention_mask=mask.bool(), seed=3).images
    assert_same_pictures(noisy_images, from_text.images)


def test_encode_prompt_with_the_padding_that_is_needed_only(pipe):
    """The unpadded form runs fewer tokens; it differs from the padded one where nothing looks."""
    arguments = {"complex_human_instruction": ["Describe: "]}
    whole, whole_mask = pipe.encode_prompt([PROMPT, LONG], **arguments)
    embeds, mask = pipe.encode_prompt([PROMPT, LONG], padding="longest", **arguments)
    length = int(whole_mask.sum(1).max())
    assert embeds.shape[:2] == mask.shape == (2, length)
    assert torch.equal(mask, whole_mask[:, :length])
    used = mask.bool()
    torch.testing.assert_close(embeds[used], whole[:, :length][used], atol=FP32_ATOL, rtol=0)
    assert not embeds[~used].any()
    assert whole[:, length:].any()  # as published, not zeros
    with pytest.raises(ValueError, match="'longest_first'"):
        pipe.encode_prompt(PROMPT, padding="longest_first")


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


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_generator_draws_as_often_as_published(pipe, steps):
    """Once at the start and once in each step: also after the last one, where it only moves the generator on."""
    generator, expected = seeded(), seeded()
    pipe(PROMPT, steps, generator=generator)
    for _ in range(1 + steps):
        torch.randn(1, 4, 8, 8, generator=expected)
    assert torch.equal(generator.get_state(), expected.get_state())


def test_random_seeds_follow_the_global_generator(pipe):
    torch.manual_seed(3)
    first, second = pipe(PROMPT), pipe(PROMPT)
    assert first.seeds != second.seeds  # equal once in 2**32 runs
    torch.manual_seed(3)
    assert pipe(PROMPT).seeds == first.seeds
    assert_same_pictures(pipe(PROMPT, seed=first.seeds[0]).images, first.images)


def test_given_seeds_leave_the_global_generator_alone(pipe):
    state = torch.get_rng_state()
    pipe(PROMPT, seed=1)
    pipe(PROMPT, generator=seeded())
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


# ----- signatures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", [SanaSprintPipeline, SanaSprintControlNetPipeline])
def test_every_argument_is_named_and_typed_and_the_published_ones_keep_their_order(pipeline):
    parameters = dict(inspect.signature(pipeline.__call__).parameters)
    del parameters["self"]
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in parameters.values())
    kinds = {parameter.kind for parameter in parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    published = list(inspect.signature(diffusers.SanaSprintPipeline.__call__).parameters)[1:]
    by_position = [name for name, each in parameters.items() if each.kind != inspect.Parameter.KEYWORD_ONLY]
    assert by_position == published


def test_arguments_of_both_pipelines_have_the_same_defaults():
    text, control = (
        inspect.signature(pipeline.__call__).parameters
        for pipeline in (SanaSprintPipeline, SanaSprintControlNetPipeline)
    )
    assert {name: control[name].default for name in text} == {
        name: parameter.default for name, parameter in text.items()
    }
