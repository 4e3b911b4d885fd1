"""Results of calls, and the image processor beside them."""

import copy
import pickle

import numpy as np
import pytest
import torch
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_1024_BIN
from PIL import Image

import sana_sprint
from tests.helpers.pipeline import PROMPT, seeded
from tests.helpers.published import both_refuse, quiet, same


def call(lib, folder, **settings):
    return quiet(lib, folder)(PROMPT, num_inference_steps=2, generator=seeded(), **settings)


# ----- outputs --------------------------------------------------------------------------------------------------------


def test_an_output_as_a_mapping_and_a_tuple(folder):
    def run(lib, folder):
        out = call(lib, folder, output_type="latent")
        (images,) = out.to_tuple()
        by_key = [out["images"], out.get("images"), next(iter(out.values())), dict(out)["images"]]
        by_index = [out[0], out[-1], out[:1], out[1:]]
        keys = [list(out), list(out.keys()), [key for key, _ in out.items()], "images" in out, len(out)]
        return images, by_key, by_index, keys, list({**out})

    same(run, folder)


def test_the_images_of_an_output_can_be_replaced(folder):
    def run(lib, folder):
        out = call(lib, folder, output_type="latent")
        out.images = out.images * 2
        seen = [out[0].clone(), out["images"].clone(), out.images.clone()]
        out["images"] = out.images + 1
        return [*seen, out[0], out.images, out.to_tuple()]

    same(run, folder)


def test_what_an_output_does_not_have(lib, folder):
    out = call(lib, folder, output_type="latent")
    with pytest.raises(KeyError):
        out["latents"]
    with pytest.raises(IndexError):
        out[1]


def test_an_output_is_copied_pickled_and_compared_by_identity(folder):
    """diffusers compares outputs like dictionaries, which fails for tensors of several values."""
    out = call(sana_sprint, folder, output_type="latent")
    for other in (copy.copy(out), copy.deepcopy(out), pickle.loads(pickle.dumps(out))):
        assert torch.equal(other.images, out.images)
        assert other.times == out.times
        assert other != out == out
    assert len({out, out}) == 1


def test_the_published_output_class(folder):
    """A subclass of it is what calls return; code that makes outputs of its own needs the images only."""
    made = sana_sprint.SanaPipelineOutput([1, 2])
    assert (made[0], made.to_tuple(), list(made)) == ([1, 2], ([1, 2],), ["images"])
    assert sana_sprint.SanaPipelineOutput(images=[3]).images == [3]
    assert isinstance(call(sana_sprint, folder, output_type="latent"), sana_sprint.SanaPipelineOutput)
    with pytest.raises(KeyError, match="'seeds'"):
        made["seeds"] = (1,)


# ----- the image processor --------------------------------------------------------------------------------------------


def picture(width, height, mode="RGB"):
    """A picture of noise with a gradient, so that every way of resizing shows."""
    values = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    values[..., 0] = np.linspace(0, 255, width, dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def unit(*shape):
    return torch.rand(shape, generator=seeded(4))


@pytest.mark.parametrize(
    "size", [{}, {"height": 64, "width": 96}, {"height": 70}, {"crops_coords": (3, 5, 43, 69)}]
)
def test_preprocessing_pil_pictures(folder, size):
    def run(lib, folder):
        processor = quiet(lib, folder).image_processor
        one = processor.preprocess(picture(70, 101), **size)
        return one, processor.preprocess([picture(70, 101), picture(100, 64)], **size)

    same(run, folder)


@pytest.mark.parametrize("size", [{}, {"height": 32, "width": 64}])
def test_preprocessing_arrays_and_tensors(folder, size):
    def run(lib, folder):
        processor = quiet(lib, folder).image_processor
        tensor = unit(2, 3, 70, 96)
        array = tensor.permute(0, 2, 3, 1).numpy()
        forms = [tensor, tensor[0], [tensor[0], tensor[1]], array, array[0], [array[0], array[1]]]
        return [processor.preprocess(form, **size) for form in forms]

    same(run, folder)


@pytest.mark.filterwarnings("ignore:Passing `image` as torch tensor:FutureWarning")
def test_preprocessing_tensors_that_are_in_the_range_already(folder):
    """diffusers warns."""

    def run(lib, folder):
        return quiet(lib, folder).image_processor.preprocess(unit(1, 3, 32, 32) * 2 - 1)

    same(run, folder)


def test_pictures_of_other_modes_become_rgb(folder):
    """diffusers keeps their channels, which no autoencoder takes."""
    processor = quiet(sana_sprint, folder).image_processor
    for mode in ("L", "RGBA", "P"):
        assert processor.preprocess(picture(64, 32, mode)).shape == (1, 3, 32, 64)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda processor: processor.preprocess("cat.png"), "PIL pictures, arrays or tensors, got: str"),
        (lambda processor: processor.preprocess([]), "at least one picture"),
        (lambda processor: processor.preprocess(unit(5, 5)), r"three axes.* got: \(5, 5\)"),
        (lambda processor: processor.preprocess(unit(3, 8, 8), resize_mode="stretch"), "got: 'stretch'"),
    ],
)
def test_pictures_that_cannot_be_preprocessed_are_refused(folder, wrong, match):
    def run(lib, folder):
        return wrong(quiet(lib, folder).image_processor)

    if (
        "stretch" in match or "three axes" in match
    ):  # diffusers lets these two through, with other results or later errors
        with pytest.raises(ValueError, match=match):
            run(sana_sprint, folder)
    else:
        both_refuse(run, folder, match=match)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
@pytest.mark.parametrize("flags", [None, [True, False]])
def test_postprocessing(folder, output_type, flags):
    def run(lib, folder):
        decoded = unit(2, 3, 20, 30) * (1 if flags else 3)  # in [0,1] for flags; clipped without
        return quiet(lib, folder).image_processor.postprocess(decoded, output_type, flags)

    same(run, folder)


def test_decoding_by_hand_as_in_the_published_examples(folder):
    def run(lib, folder):
        pipe = quiet(lib, folder)
        latents = pipe(PROMPT, height=512, width=1024, output_type="latent", generator=seeded())[0]
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor)
        decoded = decoded if isinstance(decoded, torch.Tensor) else decoded.sample
        decoded = pipe.image_processor.resize_and_crop_tensor(decoded.detach(), 1500, 760)
        return pipe.image_processor.postprocess(decoded, output_type="pil")

    same(run, folder)


def test_conversions(folder):
    def run(lib, folder):
        pipe = quiet(lib, folder)
        processor, array = pipe.image_processor, unit(2, 5, 6, 3).numpy()
        return (
            processor.numpy_to_pil(array),
            processor.numpy_to_pil(array[0]),
            processor.numpy_to_pil(array[..., :1]),
            pipe.numpy_to_pil(array),
            processor.pil_to_numpy(picture(5, 6)),
            processor.pil_to_numpy([picture(5, 6), picture(5, 6)]),
            processor.numpy_to_pt(array),
            processor.numpy_to_pt(array[..., 0]),
            processor.pt_to_numpy(unit(2, 3, 5, 6).half()),
            processor.normalize(array),
            processor.denormalize(unit(2, 3, 5, 6) * 4 - 2),
        )

    same(run, folder)


@pytest.mark.parametrize("size", [(1024, 1024), (600, 2000), (1080, 1920), (2048, 512), (100, 117)])
def test_buckets(folder, size):
    def run(lib, folder):
        processor = quiet(lib, folder).image_processor
        return processor.classify_height_width_bin(*size, ratios=ASPECT_RATIO_1024_BIN)

    found = same(run, folder)
    # Here the model's own buckets need no table.
    assert quiet(sana_sprint, folder).image_processor.classify_height_width_bin(*size) == found


def test_buckets_without_a_transformer_need_a_table(folder):
    pipe = quiet(sana_sprint, folder, transformer=None)
    with pytest.raises(ValueError, match="give ratios"):
        pipe.image_processor.classify_height_width_bin(1024, 1024)


@pytest.mark.parametrize("size", [(96, 80), (64, 80), (200, 100)])
def test_resizing_up(folder, size):
    """Shrinking is antialiased here, and plain there."""

    def run(lib, folder):
        return quiet(lib, folder).image_processor.resize_and_crop_tensor(unit(2, 3, 64, 48), *size)

    same(run, folder)
