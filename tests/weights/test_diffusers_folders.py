"""Folders that diffusers writes load here, and folders written here load in diffusers: bitwise, in every layout."""

import json

import diffusers
import pytest
import torch
from torch import nn

from sana_sprint.models.autoencoder import AutoencoderConfig, AutoencoderDC
from sana_sprint.models.transformer import SanaTransformer2DModel, TransformerConfig
from sana_sprint.weights import ModelIndex, load_model, read_model_index, save_model, write_model_index

TRANSFORMER = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 12,
    "sample_size": 8,
    "guidance_embeds": True,
    "qk_norm": "rms_norm_across_heads",
}
AUTOENCODER = {
    "latent_channels": 4,
    "attention_head_dim": 8,
    "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 16),
    "decoder_block_out_channels": (8, 16),
    "encoder_layers_per_block": (1, 1),
    "decoder_layers_per_block": (1, 1),
    "encoder_qkv_multiscales": ((), (5,)),
    "decoder_qkv_multiscales": ((), (5,)),
    "upsample_block_type": "interpolate",
    "downsample_block_type": "conv",
    "scaling_factor": 0.41407,
}
# Class and config of ours, class of theirs, config.
MODELS = {
    "transformer": (SanaTransformer2DModel, TransformerConfig, diffusers.SanaTransformer2DModel, TRANSFORMER),
    "autoencoder": (AutoencoderDC, AutoencoderConfig, diffusers.AutoencoderDC, AUTOENCODER),
}
LAYOUTS = [
    {},
    {"variant": "fp16"},
    {"max_shard_size": "10KB"},
    {"variant": "bf16", "max_shard_size": "10KB"},
]


@pytest.fixture(params=MODELS)
def kinds(request):
    return MODELS[request.param]


@pytest.fixture(params=LAYOUTS, ids=lambda layout: "-".join(map(str, layout.values())) or "plain")
def layout(request):
    return request.param


def drawn(model: nn.Module) -> nn.Module:
    """Every tensor random, so that none can stand in for another as ones and zeros could."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def assert_same_state(one: nn.Module, other: nn.Module, dtype: torch.dtype) -> None:
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype == dtype, key
        assert torch.equal(value, other[key]), key


def notes_aside(path):
    return {k: v for k, v in json.loads(path.read_text()).items() if not k.startswith("_")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_diffusers_saves_and_we_load(kinds, layout, dtype, tmp_path):
    ours, config, theirs, values = kinds
    written = drawn(theirs(**values)).to(dtype)
    written.save_pretrained(tmp_path, **layout)
    loaded = load_model(ours, tmp_path, variant=layout.get("variant"))
    assert_same_state(loaded, written, dtype)
    assert loaded.config == config(**values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_we_save_and_diffusers_loads(kinds, layout, dtype, tmp_path):
    ours, config, theirs, values = kinds
    written = drawn(ours(config(**values)))
    save_model(written, tmp_path, dtype=dtype, **layout)
    loaded, report = theirs.from_pretrained(
        tmp_path, variant=layout.get("variant"), torch_dtype=dtype, output_loading_info=True
    )
    assert not any(report.values()), report  # missing, unexpected and mismatched keys, errors
    assert_same_state(loaded, written.to(dtype), dtype)
    for name, value in values.items():
        assert loaded.config[name] in (value, json.loads(json.dumps(value))), name


def test_both_write_the_same_files_and_config(kinds, layout, tmp_path):
    ours, config, theirs, values = kinds
    model = drawn(ours(config(**values)))
    reference = theirs(**values)
    reference.load_state_dict(model.state_dict())
    save_model(model, tmp_path / "ours", **layout)
    reference.save_pretrained(tmp_path / "theirs", **layout)
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == names
    for name in names:
        ours_file, theirs_file = tmp_path / "ours" / name, tmp_path / "theirs" / name
        if name == "config.json":
            assert notes_aside(ours_file) == notes_aside(theirs_file)
            assert json.loads(ours_file.read_text())["_class_name"] == theirs.__name__
        elif name.endswith(".json"):
            ours_index, theirs_index = json.loads(ours_file.read_text()), json.loads(theirs_file.read_text())
            assert ours_index["metadata"] == theirs_index["metadata"]
            # Which key is in which shard depends on the order in which a constructor makes its layers.
            assert ours_index["weight_map"].keys() == theirs_index["weight_map"].keys()
        elif "max_shard_size" not in layout:
            assert ours_file.read_bytes() == theirs_file.read_bytes()


def test_model_index_of_a_pipeline(tmp_path):
    pipeline = diffusers.SanaSprintPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=diffusers.AutoencoderDC(**AUTOENCODER),
        transformer=diffusers.SanaTransformer2DModel(**TRANSFORMER),
        scheduler=diffusers.SCMScheduler(),
    )
    pipeline.save_pretrained(tmp_path / "theirs")
    index = read_model_index(tmp_path / "theirs")
    assert index == ModelIndex(
        class_name="SanaSprintPipeline",
        components={
            "scheduler": ("diffusers", "SCMScheduler"),
            "text_encoder": None,
            "tokenizer": None,
            "transformer": ("diffusers", "SanaTransformer2DModel"),
            "vae": ("diffusers", "AutoencoderDC"),
        },
    )
    transformer = load_model(SanaTransformer2DModel, tmp_path / "theirs" / "transformer")
    vae = load_model(AutoencoderDC, tmp_path / "theirs" / "vae")

    save_model(transformer, tmp_path / "ours" / "transformer")
    save_model(vae, tmp_path / "ours" / "vae")
    write_model_index(tmp_path / "ours", index)
    diffusers.SCMScheduler().save_pretrained(tmp_path / "ours" / "scheduler")
    again = diffusers.SanaSprintPipeline.from_pretrained(tmp_path / "ours", tokenizer=None, text_encoder=None)
    assert_same_state(again.transformer, pipeline.transformer, torch.float32)
    assert_same_state(again.vae, pipeline.vae, torch.float32)
    assert again.text_encoder is None


def test_loading_our_models_draws_no_random_numbers(kinds, tmp_path):
    ours, config, _, values = kinds
    save_model(ours(config(**values)), tmp_path)
    before = torch.get_rng_state()
    load_model(ours, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
