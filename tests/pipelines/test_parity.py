"""Pictures against the published pipeline, on folders of random weights that either of the two has written."""

import diffusers
import numpy as np
import pytest
import torch

from sana_sprint.pipelines.text_to_image import SanaSprintPipeline
from tests.helpers.pipeline import (
    BUCKET_AUTOENCODER,
    BUCKET_TRANSFORMER,
    pixels,
    save_published_folder,
    tiny_pipeline,
)

PROMPTS = ["a red cat on the moon", "the tiny astronaut in a photo of dogs"]
# Both run fp32 through the same layers in another order of sums; a value near the middle between two of 255 levels may
# then be rounded either way, and the text (run without padding here) adds rounding of its own.
LEVELS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_published_folder(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def ours(folder):
    return SanaSprintPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    return load_published(folder)


def load_published(folder):
    pipe = diffusers.SanaSprintPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 11) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same_pictures(found, expected) -> None:
    found, expected = pixels(found), pixels(expected)
    assert found.shape == expected.shape
    # Flat or clipped pictures would be equal whatever the pipelines did.
    assert expected.std() > 20
    assert np.isin(expected, (0, 255)).mean() < 0.2
    assert np.abs(found - expected).max() <= LEVELS


STEPS = {
    1: {"num_inference_steps": 1, "intermediate_timesteps": None},
    2: {"num_inference_steps": 2},
    4: {"num_inference_steps": 4, "intermediate_timesteps": None},
}
# Where the published pipeline's own schedule differs from ours: for 4 steps it is uniform.
OWN_STEPS = {1: STEPS[1], 2: STEPS[2], 4: {"timesteps": torch.linspace(1.57080, 0, 5).tolist()}}
SIZE = {"height": 32, "width": 32, "use_resolution_binning": False}  # it has buckets for one native size only


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_same_generator_same_picture(ours, theirs, steps):
    expected = theirs(PROMPTS[0], generator=seeded(), **STEPS[steps], **SIZE).images
    found = ours(PROMPTS[0], generator=seeded(), **OWN_STEPS[steps], **SIZE).images
    assert_same_pictures(found, expected)


def test_our_presets_are_theirs_where_they_have_them(ours, theirs):
    """The default call, but for size and binning."""
    expected = theirs(PROMPTS[0], generator=seeded(), **SIZE).images
    assert_same_pictures(ours(PROMPTS[0], generator=seeded(), **SIZE).images, expected)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_several_prompts_and_images(ours, theirs, steps):
    """Their num_images_per_prompt mixes up the masks of several prompts, so they get each prompt twice instead."""
    twice = [prompt for prompt in PROMPTS for _ in range(2)]
    expected = theirs(twice, generator=seeded(), **STEPS[steps], **SIZE).images
    found = ours(PROMPTS, num_images_per_prompt=2, generator=seeded(), **OWN_STEPS[steps], **SIZE).images
    assert_same_pictures(found, expected)


def test_a_generator_per_image(ours, theirs):
    expected = theirs(PROMPTS, generator=[seeded(1), seeded(2)], **SIZE).images
    assert_same_pictures(ours(PROMPTS, generator=[seeded(1), seeded(2)], **SIZE).images, expected)
    assert_same_pictures(ours(PROMPTS, seed=1, **SIZE).images, expected)


@pytest.mark.parametrize(("height", "width"), [(32, 96), (64, 32)])
def test_other_sizes_without_buckets(ours, theirs, height, width):
    size = {"height": height, "width": width, "use_resolution_binning": False}
    expected = theirs(PROMPTS[0], generator=seeded(), **size).images
    assert_same_pictures(ours(PROMPTS[0], generator=seeded(), **size).images, expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 3.0},
        {"max_timesteps": 1.5, "intermediate_timesteps": 1.0},
        {"complex_human_instruction": ["Describe the picture: "]},
        {"complex_human_instruction": None, "max_sequence_length": 6},
        {"max_sequence_length": 7},
        {"clean_caption": True, "prompt": "a red CAT http://a.com/b #12 (photo)"},
        {"latents": torch.randn(1, 4, 8, 8, generator=seeded(5))},
    ],
)
def test_other_arguments(ours, theirs, settings):
    arguments = {"prompt": PROMPTS[1], **settings, **SIZE}
    expected = theirs(generator=seeded(), **arguments).images
    assert_same_pictures(ours(generator=seeded(), **arguments).images, expected)


def test_their_embeddings_in_our_pipeline(ours, theirs):
    embeds, mask = theirs.encode_prompt(PROMPTS, complex_human_instruction=["Describe: "])
    arguments = {"prompt_embeds": embeds, "prompt_attention_mask": mask, **SIZE}
    expected = theirs(generator=seeded(), **arguments).images
    assert_same_pictures(ours(generator=seeded(), **arguments).images, expected)
    own_embeds, own_mask = ours.encode_prompt(PROMPTS, complex_human_instruction=["Describe: "])
    arguments = {"prompt_embeds": own_embeds, "prompt_attention_mask": own_mask, **SIZE}
    assert_same_pictures(theirs(generator=seeded(), **arguments).images, expected)


def test_latents_after_each_step_and_at_the_end(ours, theirs):
    def watch(pipe, **settings):
        steps = []

        def callback(_, i, t, tensors):
            steps.append((i, float(t), tensors["latents"].clone()))
            return tensors

        final = pipe(
            PROMPTS[0],
            generator=seeded(),
            output_type="latent",
            callback_on_step_end=callback,
            **settings,
            **SIZE,
        )
        return steps, final.images

    (found, final), (expected, final_expected) = watch(ours), watch(theirs)
    # Unit-variance latents through a few fp32 layers: about 1e-6 of rounding each.
    close = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(final, final_expected, **close)
    assert [(i, t) for i, t, _ in found] == [(i, t) for i, t, _ in expected]
    for (_, _, latents), (_, _, latents_expected) in zip(found, expected, strict=True):
        torch.testing.assert_close(latents, latents_expected, **close)


@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_other_output_types(ours, theirs, output_type):
    expected = theirs(PROMPTS[0], generator=seeded(), output_type=output_type, **SIZE).images
    found = ours(PROMPTS[0], generator=seeded(), output_type=output_type, **SIZE).images
    assert type(found) is type(expected)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert abs(np.asarray(found) - np.asarray(expected)).max() <= LEVELS / 255


def test_bfloat16_stays_near_their_bfloat16(folder):
    """Two orders of rounding to 8 bits of mantissa: near, not equal. An error of a step or scale would be far."""
    low = SanaSprintPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    published = diffusers.SanaSprintPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    published.set_progress_bar_config(disable=True)
    found = pixels(low(PROMPTS, generator=seeded(), **SIZE).images)
    expected = pixels(published(PROMPTS, generator=seeded(), **SIZE).images)
    exact = pixels(SanaSprintPipeline.from_pretrained(folder)(PROMPTS, generator=seeded(), **SIZE).images)
    assert np.abs(found - exact).mean() <= 1.2 * np.abs(expected - exact).mean()


# ----- buckets --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bucket")
    return save_published_folder(folder, BUCKET_TRANSFORMER, BUCKET_AUTOENCODER)


@pytest.mark.parametrize(
    ("height", "width"),
    [
        (1024, 1024),  # a bucket itself
        (832, 1216),
        (1120, 1120),  # enlarged
        (720, 2048),  # enlarged and cropped
    ],
)
def test_buckets_resized_and_cropped(bucket_folder, height, width):
    size = {"height": height, "width": width, "num_inference_steps": 1, "intermediate_timesteps": None}
    expected = load_published(bucket_folder)(PROMPTS[0], generator=seeded(), **size).images
    output = SanaSprintPipeline.from_pretrained(bucket_folder)(PROMPTS[0], generator=seeded(), **size)
    assert output.images[0].size == (width, height)
    assert_same_pictures(output.images, expected)


# ----- the other way round --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"variant": "tiny"}, {"max_shard_size": "40KB"}])
def test_they_load_what_we_saved(tmp_path, settings):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path, **settings)
    if "max_shard_size" in settings:
        assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    published = diffusers.SanaSprintPipeline.from_pretrained(tmp_path, variant=settings.get("variant"))
    published.set_progress_bar_config(disable=True)
    expected = published(PROMPTS, generator=seeded(), **SIZE).images
    assert_same_pictures(pipe(PROMPTS, generator=seeded(), **SIZE).images, expected)
    loaded = SanaSprintPipeline.from_pretrained(tmp_path, variant=settings.get("variant"))
    assert_same_pictures(loaded(PROMPTS, generator=seeded(), **SIZE).images, expected)
