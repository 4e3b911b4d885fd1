"""Quantised components: near the originals, the same from their folders, and refused where they cannot run."""

import pytest
import torch
from torch import nn

from sana_sprint.models.transformer import SanaTransformer2DModel
from sana_sprint.pipelines.text_to_image import SanaSprintPipeline
from sana_sprint.quantize.layers import QuantizedLayer
from tests.helpers.quantize import ON_CPU, emoji, needs_vnni, picture, relative


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
