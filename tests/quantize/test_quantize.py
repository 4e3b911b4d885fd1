"""Quantised components: near the originals, the same from their folders, and refused where they cannot run."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from sana_sprint.backends.cpu.strips import convolve_rows
from sana_sprint.backends.cpu.subpixel import phase_convolution, upsample
from sana_sprint.models.dc_blocks import UpBlock, channels_to_space, repeat_channels
from sana_sprint.models.transformer import SanaTransformer2DModel
from sana_sprint.pipelines.text_to_image import SanaSprintPipeline
from sana_sprint.quantize import PRESETS, parse_request
from sana_sprint.quantize.formats import decode, encode
from sana_sprint.quantize.layers import (
    QuantizedConv2d,
    QuantizedLayer,
    QuantizedLinear,
    QuantizedPhases,
    QuantizedUpBlock,
)
from sana_sprint.quantize.matmul import int8_rows
from sana_sprint.quantize.models import quantize_model
from sana_sprint.torch_private import has_vnni
from tests.helpers.autoencoders import tiny_autoencoder
from tests.helpers.cli import assert_refused, call, succeed

needs_vnni = pytest.mark.skipif(not has_vnni(), reason="int8 on a CPU needs VNNI instructions")
ON_CPU = ["int8-weights", "nf4", "int4-weights", pytest.param("int8", marks=needs_vnni)]
# Relative error (root mean square) of a weight of normal numbers: a step of the largest of 256 (or 64) over 127 (or 7)
# parts, uniformly rounded; nf4's is measured on the published levels; fp8 has 3 bits of fraction.
WEIGHT_ERROR = {"int8": 0.01, "int8-weights": 0.01, "fp8": 0.03, "nf4": 0.10, "int4-weights": 0.12}
COMPONENTS = ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")


def relative(found, expected):
    return float((found.float() - expected.float()).norm().detach() / expected.float().norm().detach())


def emoji(**arguments):
    pipe = SanaSprintPipeline.from_pretrained("emoji", torch_dtype=torch.bfloat16, **arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe, prompt="a red apple", **arguments):
    return pipe(prompt, **{"seed": 3, "num_inference_steps": 1, "output_type": "pt", **arguments}).images


# ----- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_codes_stand_for_the_weight(preset):
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(0))
    weight[3] = 0.0
    codes, scale = encode(weight, preset)
    assert relative(decode(codes, scale, preset), weight) < WEIGHT_ERROR[preset]
    assert torch.equal(decode(codes, scale, preset)[3], torch.zeros(256))
    assert torch.equal(scale, scale.bfloat16().float()), "a cast to bf16 and back must not change the scale"


@pytest.mark.parametrize("preset", PRESETS)
def test_quantising_twice_errs_no_more_than_twice(preset):
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    once = decode(*encode(weight, preset), preset)
    # A row's largest code need not be used after the scale was rounded up: then the second grid is a finer one.
    assert relative(decode(*encode(once, preset), preset), once) < WEIGHT_ERROR[preset]


# ----- layers ---------------------------------------------------------------------------------------------------------


@needs_vnni
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_the_product_of_the_rounded_numbers(dtype):
    torch.manual_seed(0)
    layer = nn.Linear(64, 40).to(dtype)
    quantized = QuantizedLinear.of(layer, "int8")
    x = torch.randn(3, 7, 64).to(dtype)
    step = x.float().abs().amax(-1, keepdim=True) / 127
    if dtype == torch.bfloat16:  # steps are numbers that it can hold
        step = torch.where(step.bfloat16() < step, (step * (1 + 2**-8)).bfloat16(), step.bfloat16()).float()
    expected = F.linear((x.float() / step).round() * step, quantized.weight.float(), layer.bias.float())
    # The sums are whole numbers and exact: what is left is the rounding of the result, twice in bf16.
    assert relative(quantized(x), expected) < (1e-6 if dtype == torch.float32 else 5e-3)
    assert quantized(x).dtype == dtype


def test_the_other_int8_kernel_agrees_with_the_rounded_product():
    torch.manual_seed(0)
    codes, scale = encode(torch.randn(40, 64), "int8")
    x = torch.randn(5, 64)  # fewer rows than the kernel takes: they are filled up
    step = x.abs().amax(-1, keepdim=True) / 127
    expected = ((x / step).round() * step) @ decode(codes, scale, "int8").T
    # Whole numbers again; fp32 rounding of the two scales.
    torch.testing.assert_close(int8_rows(x, codes, None, scale.flatten()), expected, rtol=1e-5, atol=1e-5)


@needs_vnni
def test_strips_of_an_int8_convolution():
    """A strip has a scale of its own; of the whole picture it is the picture's."""
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 24, 3, padding=1)
    quantized = QuantizedConv2d.of(layer, "int8")
    x = torch.randn(1, 16, 10, 12)
    assert torch.equal(convolve_rows(quantized, x, 0, 10), quantized(x))
    strip = convolve_rows(quantized, x, 3, 7)
    assert strip.shape == (1, 24, 4, 12)
    assert relative(strip, layer(x)[:, :, 3:7]) < 0.02
    assert torch.equal(quantized(x), quantized(x))  # with the codes that strips were given


@needs_vnni
def test_rows_are_rounded_alike_in_any_number_of_pieces(monkeypatch):
    torch.manual_seed(0)
    layer = QuantizedLinear.of(nn.Linear(64, 40), "int8")
    x = torch.randn(9, 64)
    whole = layer(x)
    monkeypatch.setattr("sana_sprint.backends.cpu.strips.PIECE", 130)  # two rows
    assert torch.equal(layer(x), whole)


def upblocks(model: nn.Module) -> list[UpBlock]:
    return [module for module in model.decoder.modules() if isinstance(module, UpBlock)]


def test_upsampling_stays_as_it_is_where_only_weights_are_rounded():
    model = tiny_autoencoder("published")
    quantize_model(model, "vae", "int8-weights")
    assert upblocks(model)
    assert all(isinstance(block.conv, nn.Conv2d) for block in upblocks(model))


@needs_vnni
@pytest.mark.parametrize("shortcut", [False, True])
def test_int8_upsampling_is_that_of_the_rounded_numbers(shortcut):
    torch.manual_seed(0)
    block = UpBlock(16, 8, interpolate=True, shortcut=shortcut)
    x = torch.randn(2, 16, 5, 7)
    x[1] *= 30
    step = x.abs().amax((1, 2, 3), keepdim=True) / 127
    with torch.no_grad():
        plain = block(x)
        block.__class__ = QuantizedUpBlock
        block.conv = quantized = QuantizedPhases.of(phase_convolution(block.conv), "int8")
        convolve = partial(F.conv2d, weight=quantized.weight, bias=quantized.bias, padding=(0, 1))
        expected = upsample((x / step).round() * step, convolve, 8, None)
        if shortcut:
            expected += channels_to_space(repeat_channels(x, block.repeats))
        found = block(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)  # exact sums, fp32 scales
    assert relative(found, plain) < 0.02


@needs_vnni
@pytest.mark.parametrize("stride", [1, 2])
def test_int8_convolution_is_the_convolution_of_the_rounded_numbers(stride):
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 24, 3, padding=1, stride=stride)
    quantized = QuantizedConv2d.of(layer, "int8")
    x = torch.randn(2, 16, 10, 12)
    x[1] *= 30
    step = x.abs().amax((1, 2, 3), keepdim=True) / 127
    expected = F.conv2d((x / step).round() * step, quantized.weight, layer.bias, stride=stride, padding=1)
    torch.testing.assert_close(quantized(x), expected, rtol=1e-5, atol=1e-4)  # exact sums, fp32 scales


@pytest.mark.parametrize("preset", ON_CPU)
def test_a_row_and_a_picture_do_not_depend_on_their_neighbours(preset):
    torch.manual_seed(0)
    linear = QuantizedLinear.of(nn.Linear(64, 32).bfloat16(), preset)
    convolution = QuantizedConv2d.of(nn.Conv2d(16, 16, 3, padding=1).bfloat16(), preset)
    for layer, x in ((linear, torch.randn(4, 9, 64)), (convolution, torch.randn(4, 16, 8, 8))):
        x = (x * torch.tensor([1.0, 100.0, 0.01, 1.0]).view(-1, *[1] * (x.ndim - 1))).bfloat16()
        # Other sizes may sum in another order; a scale over the batch would cost the small picture everything.
        assert relative(layer(x)[2:3], layer(x[2:3])) < 5e-3


# ----- pipelines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ON_CPU)
def test_pictures_stay_near_and_a_folder_draws_the_same(tmp_path, preset):
    plain = picture(emoji())
    pipe = emoji(quantization_config={"transformer": preset, "text_encoder": preset, "vae": preset})
    found = picture(pipe)
    # A picture in [0,1]; 4 bits may move an edge, while another picture or noise would differ by far more.
    assert 0 < (found - plain).abs().mean() < 0.12
    pipe.save_pretrained(tmp_path)
    again = SanaSprintPipeline.from_pretrained(tmp_path)
    for name in ("transformer", "text_encoder", "vae"):
        assert getattr(again, name).quantization == preset
        stored = getattr(again, name).state_dict()
        for key, value in getattr(pipe, name).state_dict().items():
            assert torch.equal(stored[key], value), key
    # The same numbers at other places in memory, which the kernels' order of sums can depend on: one of 255 levels.
    assert (picture(again) - found).abs().max() < 1.01 / 255


def test_what_is_sensitive_stays():
    transformer = emoji(quantization_config="int8-weights").transformer
    kept = {name for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    assert {"proj_out", "patch_embed.proj", "time_embed.linear", "caption_projection.linear_1"} <= kept
    assert {name for name in kept if name.startswith("transformer_blocks.0.")} == {
        "transformer_blocks.0.ff.conv_depth"
    }


def test_one_setting_is_for_transformer_and_text_encoder_and_given_parts_stay():
    given = emoji().text_encoder
    pipe = emoji(quantization_config="int8-weights", text_encoder=given)
    assert pipe.text_encoder is given
    assert not any(isinstance(layer, QuantizedLayer) for layer in given.modules())
    assert pipe.transformer.quantization == "int8-weights"
    assert getattr(pipe.vae, "quantization", None) is None


def test_a_lora_is_merged_before_quantising():
    weight = emoji().transformer.transformer_blocks[0].attn1.to_q.weight
    key = "transformer.transformer_blocks.0.attn1.to_q.lora"
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(2, weight.shape[1], generator=generator) * 0.1
    up = torch.randn(weight.shape[0], 2, generator=generator)
    state = {f"{key}_A.weight": down, f"{key}_B.weight": up}
    pipe = emoji()
    pipe.load_lora_weights(state)
    pipe.quantize({"transformer": "int8-weights"})
    found = pipe.transformer.transformer_blocks[0].attn1.to_q.weight
    assert (
        relative(found, weight.float() + up @ down) < 0.02
    )  # 8 bits of a row whose largest is 4 times its usual
    assert pipe.get_active_adapters() == []
    with pytest.raises(ValueError, match="load the LoRA into the unquantised"):
        pipe.load_lora_weights(state)


def test_casts_keep_the_codes(tmp_path):
    pipe = emoji(quantization_config={"transformer": "int8-weights"})
    layer = pipe.transformer.transformer_blocks[0].attn1.to_q
    codes, scale = layer.codes.clone(), layer.scale.clone()
    pipe.to(torch.float32)
    assert pipe.dtype == layer.scale.dtype == torch.float32
    pipe.to(torch.bfloat16)
    assert torch.equal(layer.codes, codes)
    assert torch.equal(layer.scale, scale)


# ----- requests -------------------------------------------------------------------------------------------------------


def torchao(name):
    return SimpleNamespace(quant_type=type(name, (), {})())


def test_published_objects_are_understood():
    from transformers import BitsAndBytesConfig

    eight = BitsAndBytesConfig(load_in_8bit=True)
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    both = {"transformer": "int8-weights", "text_encoder": "int8-weights"}
    assert parse_request(None, COMPONENTS) == {}
    assert parse_request(eight, COMPONENTS) == both
    assert parse_request({"text_encoder": eight, "transformer": four, "vae": None}, COMPONENTS) == {
        "text_encoder": "int8-weights",
        "transformer": "nf4",
    }
    assert (
        parse_request(torchao("Int8DynamicActivationInt8WeightConfig"), COMPONENTS)["transformer"] == "int8"
    )


def test_diffusers_pipeline_configs_are_understood():
    from diffusers.quantizers import PipelineQuantizationConfig
    from transformers import BitsAndBytesConfig

    backend = PipelineQuantizationConfig(
        quant_backend="bitsandbytes_4bit",
        quant_kwargs={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        components_to_quantize=["transformer"],
    )
    assert parse_request(backend, COMPONENTS) == {"transformer": "nf4"}
    mapping = PipelineQuantizationConfig(
        quant_mapping={"text_encoder": BitsAndBytesConfig(load_in_8bit=True)}
    )
    assert parse_request(mapping, COMPONENTS) == {"text_encoder": "int8-weights"}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("int7", "no such quantisation: 'int7'; allowed: int8, "),
        ({"unet": "int8"}, "unknown components: unet"),
        (7, "not a quantisation: int"),
        (torchao("Int4Config"), "no such torchao quant_type here: Int4Config"),
        (SimpleNamespace(load_in_4bit=True, bnb_4bit_quant_type="fp4"), "must be 'nf4', got: 'fp4'"),
        (SimpleNamespace(load_in_8bit=True, llm_int8_skip_modules=["a"]), "excludes layers"),
        (SimpleNamespace(quant_backend="gguf", quant_kwargs={}), "no such quant_backend here: 'gguf'"),
    ],
)
def test_other_requests_are_refused(request_, message):
    with pytest.raises(ValueError, match=message):
        parse_request(request_, COMPONENTS)


def test_what_a_device_cannot_do_is_said_before_anything_changes():
    pipe = emoji()
    with pytest.raises(ValueError, match=r"fp8 of vae.*; cpu can run .*int8-weights"):
        pipe.quantize({"transformer": "int8-weights", "vae": "fp8"})
    with pytest.raises(ValueError, match=r"fp8 of (transformer|text_encoder) needs an NVIDIA GPU"):
        emoji(quantization_config="fp8")
    with pytest.raises(ValueError, match="scheduler cannot be quantised"):
        pipe.quantize({"scheduler": "int8-weights"})
    assert not any(isinstance(layer, QuantizedLayer) for layer in pipe.transformer.modules())
    pipe.quantize({"transformer": "int8-weights"})
    with pytest.raises(ValueError, match="quantised already, as int8-weights"):
        pipe.quantize({"transformer": "nf4"})


@needs_vnni
def test_int8_pictures_cannot_leave_the_cpu():
    pipe = emoji(quantization_config={"vae": "int8"})
    with pytest.raises(ValueError, match="int8 of vae needs the CPU"):
        pipe.to("cuda")


def test_a_folder_of_a_quantised_model_that_does_not_fit_is_refused(tmp_path):
    pipe = emoji(quantization_config={"transformer": "int8-weights"})
    pipe.save_pretrained(tmp_path)
    note = tmp_path / "transformer" / "quantization.json"
    note.write_text('{"preset": "nf4"}')
    with pytest.raises(ValueError, match="does not fit"):
        SanaSprintPipeline.from_pretrained(tmp_path)
    note.write_text('{"preset": "int5"}')
    with pytest.raises(ValueError, match="int5"):
        SanaSprintPipeline.from_pretrained(tmp_path)
    emoji().save_pretrained(tmp_path)  # the note goes with the codes
    assert isinstance(SanaSprintPipeline.from_pretrained(tmp_path).transformer, SanaTransformer2DModel)
    assert not note.exists()


# ----- the command ----------------------------------------------------------------------------------------------------


def test_the_command_merges_loras_and_quantises(tmp_path):
    key = "transformer.transformer_blocks.0.attn1.to_q.lora"
    save_file(
        {f"{key}_A.weight": torch.ones(1, 256), f"{key}_B.weight": torch.ones(256, 1)}, tmp_path / "l.st"
    )
    wanted = ["--lora", f"{tmp_path / 'l.st'}:0.5", "--quantize", "transformer=int8-weights"]
    path = succeed("generate", "a red apple", "--seed", 3, "--steps", 1, "-o", tmp_path, *wanted).split("\t")[
        0
    ]
    pipe = emoji()
    pipe.load_lora_weights(tmp_path / "l.st", adapter_name="ones")
    pipe.set_adapters("ones", 0.5)
    pipe.quantize({"transformer": "int8-weights"})
    expected = picture(pipe, output_type="pil")[0]
    # The same calls, so the same numbers but for what their places in memory do to the order of sums.
    assert np.abs(np.asarray(Image.open(path)).astype(int) - np.asarray(expected).astype(int)).max() <= 2


@pytest.mark.parametrize(
    ("option", "word"), [(["--quantize", "int7"], "int7"), (["--lora", "absent.safetensors"], "no such LoRA")]
)
def test_the_command_says_what_is_wrong(tmp_path, option, word):
    assert_refused(call("generate", "a cat", "-o", tmp_path, *option), 1, word)
