"""Making pipelines: from folders and from other pipelines, in which dtype and where; and writing folders."""

import json
import shutil

import numpy as np
import pytest
import torch

from sana_sprint.pipelines.loading import plan_devices
from sana_sprint.pipelines.text_to_image import SanaSprintPipeline
from sana_sprint.scheduler import SCMScheduler
from tests.helpers.pipeline import pixels, tiny_pipeline

PROMPT = "a red cat on the moon"
NAMES = ["tokenizer", "text_encoder", "vae", "transformer", "scheduler"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(path)
    return path


@pytest.fixture
def copied(folder, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(folder, tmp_path / "model")


def edit_index(folder, change) -> None:
    path = folder / "model_index.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# ----- folders --------------------------------------------------------------------------------------------------------


def test_what_was_saved_draws_the_same_pictures(folder):
    expected = tiny_pipeline()(PROMPT, seed=0).images
    loaded = SanaSprintPipeline.from_pretrained(folder)
    assert np.array_equal(pixels(loaded(PROMPT, seed=0).images), pixels(expected))
    assert not any(module.training for module in (loaded.text_encoder, loaded.vae, loaded.transformer))


def test_model_index_names_the_published_classes(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "SanaSprintPipeline"
    assert {name: index[name] for name in NAMES} == {
        "tokenizer": ["transformers", "TokenizersBackend"],
        "text_encoder": ["transformers", "Gemma2Model"],
        "vae": ["diffusers", "AutoencoderDC"],
        "transformer": ["diffusers", "SanaTransformer2DModel"],
        "scheduler": ["diffusers", "SCMScheduler"],
    }


def test_components_can_be_given_or_left_out(folder):
    vae, scheduler = object(), SCMScheduler(sigma_data=0.7)
    pipe = SanaSprintPipeline.from_pretrained(folder, vae=vae, text_encoder=None, scheduler=scheduler)
    assert pipe.vae is vae
    assert pipe.scheduler is scheduler
    assert pipe.text_encoder is None
    assert pipe.transformer is not None
    with pytest.raises(ValueError, match="unknown arguments: safety_checker; components are tokenizer"):
        SanaSprintPipeline.from_pretrained(folder, safety_checker=None)


def test_a_given_component_is_not_read(copied):
    shutil.rmtree(copied / "transformer")
    given = tiny_pipeline().transformer
    assert SanaSprintPipeline.from_pretrained(copied, transformer=given).transformer is given


def test_parts_that_are_missing(copied, folder):
    edit_index(copied, lambda index: index.pop("vae"))
    with pytest.raises(ValueError, match=r"lacks vae; pass them to from_pretrained"):
        SanaSprintPipeline.from_pretrained(copied)
    edit_index(copied, lambda index: index.update(vae=[None, None]))
    assert SanaSprintPipeline.from_pretrained(copied).vae is None
    shutil.rmtree(copied / "text_encoder")
    with pytest.raises(ValueError, match="text_encoder"):
        SanaSprintPipeline.from_pretrained(copied)
    (copied / "model_index.json").unlink()
    with pytest.raises(ValueError, match=r"model_index\.json"):
        SanaSprintPipeline.from_pretrained(copied)
    with pytest.raises(ValueError, match="no such model"):
        SanaSprintPipeline.from_pretrained(copied / "nowhere")


def test_an_old_folder_with_another_scheduler(copied):
    """Early published folders name a scheduler that the published pipeline then cannot use (TypeError in the call)."""
    path = copied / "scheduler" / "scheduler_config.json"
    path.write_text('{"_class_name": "DPMSolverMultistepScheduler", "solver_order": 2}')
    with pytest.raises(ValueError, match="config of a DPMSolverMultistepScheduler"):
        SanaSprintPipeline.from_pretrained(copied)
    pipe = SanaSprintPipeline.from_pretrained(copied, scheduler=SCMScheduler())
    assert pipe(PROMPT, 1, seed=0).seeds == (0,)


def test_a_pipeline_without_parts_is_saved_and_read_as_such(tmp_path):
    whole = tiny_pipeline()
    SanaSprintPipeline.from_pipe(whole, text_encoder=None, tokenizer=None).save_pretrained(tmp_path)
    pipe = SanaSprintPipeline.from_pretrained(tmp_path)
    assert (pipe.text_encoder, pipe.tokenizer) == (None, None)
    embeds, mask = whole.encode_prompt(PROMPT)
    assert pipe(prompt_embeds=embeds, prompt_attention_mask=mask, seed=0).seeds == (0,)


# ----- variants -------------------------------------------------------------------------------------------------------


def test_a_variant_is_read_where_there_is_one(copied):
    other = tiny_pipeline()
    with torch.no_grad():
        other.transformer.proj_out.bias.add_(1.0)
    other.save_pretrained(copied, variant="other")
    for name in ("vae", "text_encoder"):
        (file,) = (copied / name).glob("*.other.safetensors")
        file.unlink()
    bias = SanaSprintPipeline.from_pretrained(copied, variant="other").transformer.proj_out.bias
    assert torch.equal(bias, other.transformer.proj_out.bias)
    assert not torch.equal(SanaSprintPipeline.from_pretrained(copied).transformer.proj_out.bias, bias)
    with pytest.raises(ValueError, match=r"no component .* has the variant 'fp16'; variants there: other"):
        SanaSprintPipeline.from_pretrained(copied, variant="fp16")


# ----- dtypes ---------------------------------------------------------------------------------------------------------


def dtypes(pipe) -> list[torch.dtype]:
    return [pipe.text_encoder.dtype, pipe.vae.dtype, pipe.transformer.dtype]


@pytest.mark.parametrize("argument", ["torch_dtype", "dtype"])
def test_one_dtype_or_one_each(folder, argument):
    low, full, half = torch.bfloat16, torch.float32, torch.float16
    for request_, expected in (
        (None, [full] * 3),
        (low, [low] * 3),
        ("bfloat16", [low] * 3),
        ({"transformer": half, "default": low}, [low, low, half]),
        ({"vae": low}, [full, low, full]),
    ):
        assert dtypes(SanaSprintPipeline.from_pretrained(folder, **{argument: request_})) == expected


def test_stored_dtypes_are_kept(tmp_path):
    pipe = tiny_pipeline()
    pipe.transformer.to(torch.bfloat16)
    pipe.save_pretrained(tmp_path)
    loaded = SanaSprintPipeline.from_pretrained(tmp_path)
    assert dtypes(loaded) == [torch.float32, torch.float32, torch.bfloat16]
    assert loaded.dtype == torch.bfloat16


def test_half_precision_is_refused_where_it_breaks(folder):
    """The published pipeline loads everything in fp16 when asked, and draws black pictures."""
    with pytest.raises(ValueError, match=r"cannot run in float16: .* use float32 or bfloat16"):
        SanaSprintPipeline.from_pretrained(folder, torch_dtype=torch.float16)
    pipe = tiny_pipeline()
    with pytest.raises(ValueError, match="cannot run in float16"):
        pipe.to(torch.float16)
    assert dtypes(pipe) == [torch.float32] * 3  # nothing was changed before the error
    pipe.vae.half()
    with pytest.raises(ValueError, match="vae cannot run in float16"):
        pipe(PROMPT)


def test_contradicting_and_unknown_dtypes(folder):
    with pytest.raises(ValueError, match="one setting"):
        SanaSprintPipeline.from_pretrained(folder, dtype="float32", torch_dtype="bfloat16")
    with pytest.raises(ValueError, match="unknown components: unet"):
        SanaSprintPipeline.from_pretrained(folder, torch_dtype={"unet": "float32"})


def test_to_takes_device_and_dtype_in_any_form():
    for arguments, options in (
        ((torch.bfloat16,), {}),
        (("cpu", torch.bfloat16), {}),
        ((torch.device("cpu"),), {"dtype": "bfloat16"}),
        ((), {"device": "cpu", "dtype": torch.bfloat16}),
    ):
        pipe = tiny_pipeline()
        assert pipe.to(*arguments, **options) is pipe
        assert dtypes(pipe) == [torch.bfloat16] * 3
        assert pipe.device == torch.device("cpu")


def test_cast_pipelines_encode_anew():
    """Keys and values that were kept of the instruction must not outlive the weights they came from."""
    pipe, fresh = tiny_pipeline(), tiny_pipeline().to(torch.bfloat16)
    pipe(PROMPT, seed=0)
    pipe.to(torch.bfloat16)
    assert np.array_equal(pixels(pipe(PROMPT, seed=0).images), pixels(fresh(PROMPT, seed=0).images))


# ----- devices --------------------------------------------------------------------------------------------------------

MODULES = ["vae", "transformer", "text_encoder"]
CPU = torch.device("cpu")


@pytest.mark.parametrize("device_map", [None, "cpu", CPU, {"": "cpu"}, {"vae": "cpu"}])
def test_device_maps_of_one_device(folder, device_map):
    assert plan_devices(device_map, MODULES) == dict.fromkeys(MODULES, CPU)
    assert SanaSprintPipeline.from_pretrained(folder, device_map=device_map).device == CPU


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, ["cpu", "cpu", "cpu"]), (1, ["cuda:0", "cuda:0", "cuda:0"]), (3, ["cuda:0", "cuda:0", "cuda:2"])],
)
@pytest.mark.parametrize("device_map", ["auto", "balanced"])
def test_spreading_over_accelerators(monkeypatch, device_map, count, expected):
    accelerator = torch.device("cuda") if count else None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: accelerator)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    found = plan_devices(device_map, MODULES)
    assert [str(found[name]) for name in MODULES] == expected


def test_a_mapping_gives_each_its_device():
    found = plan_devices({"text_encoder": "cuda:1", "": "cuda:0"}, MODULES)
    assert [str(found[name]) for name in MODULES] == ["cuda:0", "cuda:0", "cuda:1"]


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ("gpu0", "not a device: 'gpu0'"),
        ({"unet": "cpu"}, "unknown components: unet"),
        ({"vae": "disk"}, "'disk'"),
    ],
)
def test_bad_device_maps_are_named(folder, device_map, message):
    with pytest.raises(ValueError, match=message):
        SanaSprintPipeline.from_pretrained(folder, device_map=device_map)


# ----- from other pipelines -------------------------------------------------------------------------------------------


def test_components_are_shared_not_copied():
    pipe = tiny_pipeline()
    assert list(pipe.components) == NAMES
    for other in (SanaSprintPipeline(**pipe.components), SanaSprintPipeline.from_pipe(pipe)):
        assert all(other.components[name] is pipe.components[name] for name in NAMES)
        assert np.array_equal(pixels(other(PROMPT, seed=0).images), pixels(pipe(PROMPT, seed=0).images))


def test_from_pipe_with_other_components():
    pipe, scheduler = tiny_pipeline(), SCMScheduler()
    assert SanaSprintPipeline.from_pipe(pipe, scheduler=scheduler).scheduler is scheduler
    with pytest.raises(ValueError, match="has no components controlnet"):
        SanaSprintPipeline.from_pipe(pipe, controlnet=None)


def test_from_pipe_asks_for_what_is_missing():
    class WithControl(SanaSprintPipeline):
        component_names = (*SanaSprintPipeline.component_names, "controlnet")

    with pytest.raises(ValueError, match="WithControl also needs controlnet"):
        WithControl.from_pipe(tiny_pipeline())


def test_a_replaced_text_encoder_is_used():
    pipe = tiny_pipeline()
    before = pipe.encode_prompt(PROMPT)[0]
    pipe.text_encoder = tiny_pipeline().text_encoder
    with torch.no_grad():
        pipe.text_encoder.norm.weight.mul_(2.0).add_(1.0)  # Gemma scales by 1 + weight
    torch.testing.assert_close(
        pipe.encode_prompt(PROMPT)[0], 2 * before, atol=1e-5, rtol=1e-5
    )  # fp32 rounding


@pytest.mark.parametrize("without", ["vae", "transformer", "scheduler"])
def test_calls_that_need_a_missing_part_name_it(without):
    pipe = SanaSprintPipeline(**{**tiny_pipeline().components, without: None})
    with pytest.raises(ValueError, match=f"made without {without}"):
        pipe(PROMPT)


def test_what_works_without_a_part():
    whole = tiny_pipeline()
    latents = whole(PROMPT, seed=0, output_type="latent").images
    no_vae = SanaSprintPipeline.from_pipe(whole, vae=None)
    size = {"height": 256, "width": 256}  # 32 pixels per latent cell are assumed
    assert torch.equal(no_vae(PROMPT, seed=0, output_type="latent", **size).images, latents)
    only_text = SanaSprintPipeline.from_pipe(whole, vae=None, transformer=None, scheduler=None)
    assert torch.equal(only_text.encode_prompt(PROMPT)[0], whole.encode_prompt(PROMPT)[0])
    no_text = SanaSprintPipeline.from_pipe(whole, text_encoder=None)
    with pytest.raises(ValueError, match="without text encoder or tokenizer: give prompt_embeds"):
        no_text(PROMPT)
    with pytest.raises(ValueError, match="no component with weights"):
        SanaSprintPipeline(**dict.fromkeys(NAMES)).device  # noqa: B018


# ----- the autoencoder's memory ---------------------------------------------------------------------------------------


def test_slicing_and_tiling_are_passed_on():
    pipe = tiny_pipeline()
    expected = pipe(PROMPT, num_images_per_prompt=2, seed=0).images
    pipe.enable_vae_slicing()
    assert pipe.vae.use_slicing
    found = pipe(PROMPT, num_images_per_prompt=2, seed=0).images
    assert np.abs(pixels(found) - pixels(expected)).max() <= 1  # sums in another order can tip a rounding
    pipe.disable_vae_slicing()
    assert not pipe.vae.use_slicing
    pipe.enable_vae_tiling(tile_size=16, overlap=4)
    assert pipe.vae.tiling.tile == (4, 4)
    assert np.abs(pixels(pipe(PROMPT, seed=0).images) - pixels(expected[:1])).max() > 1  # tiles see less
    pipe.disable_vae_tiling()
    assert pipe.vae.tiling is None
    with pytest.raises(ValueError, match="made without vae"):
        SanaSprintPipeline.from_pipe(pipe, vae=None).enable_vae_tiling()
