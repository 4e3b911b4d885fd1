"""The autoencoder by itself: config, input checks, slicing, memory layout, precision, derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sana_sprint.models import dc_blocks
from sana_sprint.models.autoencoder import AutoencoderConfig, AutoencoderDC
from tests.helpers.autoencoders import (
    AUTOENCODERS,
    PUBLISHED_AUTOENCODER,
    autoencoder_config,
    tiny_autoencoder,
)

VIT = "EfficientViTBlock"


# --- Config -------------------------------------------------------------------------------------------------------


def test_config_reads_what_it_writes():
    config = AutoencoderConfig.from_dict({"_class_name": "AutoencoderDC", **PUBLISHED_AUTOENCODER})
    assert config.downsample_block_type == "Conv"  # kept as it was written
    assert config.encoder_qkv_multiscales == ((), (), (), (5,), (5,), (5,))
    assert AutoencoderConfig.from_dict(config.to_dict()) == config


def test_unknown_fields_are_listed():
    with pytest.raises(ValueError, match="unknown fields in the autoencoder config: depth, width"):
        AutoencoderConfig.from_dict({"width": 1, "depth": 2, "latent_channels": 4})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_layers_per_block": (1, 1)}, r"decoder_layers_per_block must have 3 entries.*got \(1, 1\)"),
        ({"encoder_block_types": ("ResBlock", VIT)}, "encoder_block_types must have 3 entries"),
        ({"upsample_block_type": "bilinear"}, "upsample_block_type must be one of.*got 'bilinear'"),
        ({"upsample_block_type": "Interpolate"}, "interpolate, pixel_shuffle; got 'Interpolate'"),
        ({"downsample_block_type": "Pixel_Unshuffle"}, "Conv, conv, pixel_unshuffle; got 'Pixel_Unshuffle'"),
        (
            {"encoder_block_types": "ViT"},
            "encoder_block_types must be one of EfficientViTBlock, ResBlock; got 'ViT'",
        ),
        (
            {"decoder_block_types": ("ResBlock", "ViT", "ResBlock")},
            "decoder_block_types must be one of.*got 'ViT'",
        ),
        ({"decoder_norm_types": "layer_norm"}, "decoder_norm_types must be one of batch_norm, rms_norm; got"),
        ({"decoder_act_fns": ("silu", "tanh", "silu")}, "decoder_act_fns must be one of gelu.*got 'tanh'"),
        ({"decoder_conv_act_fn": "tanh"}, "decoder_conv_act_fn must be one of gelu.*got 'tanh'"),
        ({"scaling_factor": 0.0}, "scaling_factor must be positive; got 0.0"),
        ({"scaling_factor": float("nan")}, "scaling_factor must be positive; got nan"),
        ({"latent_channels": 0}, "latent_channels must be positive; got 0"),
        ({"in_channels": 0}, "in_channels must be positive; got 0"),
        ({"encoder_layers_per_block": (1, 0, 1)}, r"encoder_layers_per_block\[1\] must be at least 1.*got 0"),
        (
            {"decoder_layers_per_block": (1, 1, -1)},
            r"decoder_layers_per_block\[2\] must be at least 0.*got -1",
        ),
        (
            {"latent_channels": 5},
            "latent_channels must divide the 16 channels of the encoder's last stage.*got 5",
        ),
        ({"latent_channels": 5, "encoder_out_shortcut": False}, "of the decoder's last stage.*got 5"),
        (
            {"encoder_block_out_channels": (8, 12, 16)},
            r"encoder_block_out_channels\[1\] must divide 32.*got 12",
        ),
        (
            {"decoder_block_out_channels": (8, 16, 48)},
            r"decoder_block_out_channels\[2\] must divide 64.*got 48",
        ),
        ({"encoder_block_out_channels": (8, 16, 0)}, r"encoder_block_out_channels must be positive.*0\)"),
        (
            {"encoder_block_out_channels": (5, 10, 4)},
            "multiples of 4 for pixel_unshuffle; got 10",
        ),
        (
            {"encoder_block_types": VIT, "attention_head_dim": 9},
            "attention_head_dim must be from 1 to 8, the channels of encoder stage 0; got 9",
        ),
        (
            {"decoder_block_types": VIT, "decoder_qkv_multiscales": ((), (3,), (5, 4))},
            r"qkv_multiscales of decoder stage 2 must be odd kernel sizes; got \(5, 4\)",
        ),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        autoencoder_config(**changes)


def test_a_single_stage_needs_layers():
    one = {
        f"{side}_{field}": value
        for side in ("encoder", "decoder")
        for field, value in {
            "block_out_channels": (8,),
            "layers_per_block": (0,),
            "qkv_multiscales": ((),),
        }.items()
    }
    with pytest.raises(ValueError, match=r"encoder_layers_per_block\[0\] must be at least 1"):
        autoencoder_config(**one)


def test_what_no_layer_uses_is_not_checked():
    # Stage 0 without layers: its channels, heads and kernels appear nowhere.
    autoencoder_config(
        "skip_first",
        encoder_block_types=VIT,
        encoder_block_out_channels=(3, 16, 16),
        encoder_qkv_multiscales=((2,), (), ()),
    )


# --- Inputs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 8, 10), "picture width must be a positive multiple of 4 pixels; got 10"),
        ((1, 3, 9, 8), "picture height must be a positive multiple of 4 pixels; got 9"),
        ((1, 3, 0, 8), "picture height must be a positive multiple of 4 pixels; got 0"),
        ((1, 4, 8, 8), r"a picture must be \(batch, 3, height, width\); got \(1, 4, 8, 8\)"),
        ((3, 8, 8), r"a picture must be \(batch, 3, height, width\); got \(3, 8, 8\)"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        tiny_autoencoder().encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (4, 2, 2), (1, 4, 2)])
def test_latents_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=r"a latent must be \(batch, 4, height, width\); got"):
        tiny_autoencoder().decode(torch.zeros(shape))


@torch.no_grad()
def test_forward_is_the_round_trip():
    model = tiny_autoencoder()
    image = torch.rand(1, 3, 8, 12)
    assert torch.equal(model(image), model.decode(model.encode(image)))


def test_dtype_and_device():
    model = AutoencoderDC(autoencoder_config()).to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.device == torch.device("cpu")
    assert model.to("meta").device.type == "meta"


# --- Slicing ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_slicing_takes_one_picture_at_a_time():
    model = tiny_autoencoder("published")
    batches = []
    for network in (model.encoder, model.decoder):
        network.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    image = torch.rand(3, 3, 12, 8)
    expected = model(image)
    assert batches == [3, 3]
    model.enable_slicing()
    batches.clear()
    # The same sums over other batch sizes, so only fp32 rounding differs.
    torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-4)
    assert batches == [1] * 6
    model.disable_slicing()
    assert torch.equal(model(image), expected)


# --- Memory layout ------------------------------------------------------------------------------------------------


class _LayoutWatch(TorchDispatchMode):
    """Names of the operations that change a grid's layout, mix two layouts, or convolve outside channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        convolves = func is torch.ops.aten.convolution.default
        tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        inputs = set(map(_layout, tensors[:1] if convolves else tensors)) - {None}
        is_view = isinstance(out, torch.Tensor) and any(_storage(out) == _storage(x) for x in tensors)
        result = None if is_view else _layout(out)
        changed = inputs == {"channels_last"} and result == "contiguous"
        if changed or len(inputs) > 1 or (convolves and inputs == {"contiguous"}):
            self.found.append(str(func))
        return out


def _storage(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _layout(x: Any) -> str | None:
    """A grid's layout; None where sizes of 1 make it belong to both, and for anything but a grid."""
    if not isinstance(x, torch.Tensor) or x.ndim != 4:
        return None
    contiguous, last = x.is_contiguous(), x.is_contiguous(memory_format=torch.channels_last)
    return None if contiguous == last else "contiguous" if contiguous else "channels_last"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in AUTOENCODERS),
        ("published", torch.bfloat16),
        ("skip_first", torch.bfloat16),
    ],
)
@torch.no_grad()
def test_everything_stays_in_channels_last(name, dtype):
    # Weights in the ordinary layout, as a checkpoint brings them: the input alone sets the layout.
    model = tiny_autoencoder(name).to(dtype)
    ratio = model.spatial_compression_ratio
    image = torch.rand(2, model.config.in_channels, 4 * ratio, 3 * ratio).to(dtype)
    latent = torch.randn(2, model.config.latent_channels, 4, 3).to(dtype)
    outputs = {}
    for part in model.modules():
        part.register_forward_hook(lambda part, _, out: outputs.update({part: out}))
    with _LayoutWatch() as watch:
        model.encode(image)
        model.decode(latent)
    assert watch.found == []
    # Linear layers and activations are given arrays whose last axis is the channels.
    on_pixels = (torch.nn.Linear, *dc_blocks.ACTIVATIONS.values())
    outputs = {part: out for part, out in outputs.items() if not isinstance(part, on_pixels)}
    assert {type(part) for part, out in outputs.items() if _layout(out) == "contiguous"} == set()
    assert "channels_last" in map(_layout, outputs.values())


def test_the_layout_watch_sees_changes():
    grid = torch.rand(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    with _LayoutWatch() as watch:
        ordinary = grid.contiguous()
        _ = grid + ordinary
        torch.nn.functional.conv2d(ordinary, torch.ones(1, 4, 1, 1))
    assert watch.found == ["aten.clone.default", "aten.add.Tensor", "aten.convolution.default"]


# --- Precision ----------------------------------------------------------------------------------------------------


def test_attention_sums_in_fp32_in_half_precision():
    # 4096 pixels: each sum over them is past fp16's largest number, their quotients are near 1.
    heads = (torch.rand(1, 2, 4096, 12) + 4).half()
    out = dc_blocks.linear_attention(heads)
    assert out.dtype == torch.float16
    exact = dc_blocks.linear_attention(heads.double())
    torch.testing.assert_close(out.double(), exact, rtol=2**-11, atol=0)  # one rounding to fp16


def test_attention_stays_in_fp32_under_autocast():
    heads = torch.randn(1, 2, 50, 12)
    expected = dc_blocks.linear_attention(heads)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dc_blocks.linear_attention(heads), expected)


def test_attention_without_any_positive_feature_is_zero():
    assert (dc_blocks.linear_attention(-torch.rand(1, 2, 50, 12)) == 0).all()


@torch.no_grad()
def test_fp64_is_fp64_throughout():
    # A step in fp32 anywhere would swallow a change of 1e-12, or round it up to 1e-7.
    model = tiny_autoencoder("published").double()
    image = torch.rand(2, 3, 12, 8, dtype=torch.float64)
    noise = 1e-12 * torch.randn_like(image)
    shifted, still = model(image + noise), model(image)
    assert 0 < (shifted - still).abs().max() < 1e-8


# --- Derivatives --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["published", "skip_first", "shortcut_groups", "odd_shortcut_groups", "batch_norm", "per_stage_norms"],
)
def test_forward_and_reverse_mode_agree_with_differences(name):
    model = tiny_autoencoder(name).double().requires_grad_(False)
    ratio = model.spatial_compression_ratio
    image = torch.rand(1, model.config.in_channels, 3 * ratio, 2 * ratio, dtype=torch.float64)
    direction, weights = torch.randn_like(image), torch.randn_like(image)
    out, tangent = torch.func.jvp(model, (image,), (direction,))
    step = 1e-7
    difference = (model(image + step * direction) - model(image - step * direction)) / (2 * step)
    # Central differences in fp64: truncation near step^2, rounding near 1e-16 / step; ReLU kinks are missed by luck
    # of the fixed seed.
    torch.testing.assert_close(tangent, difference, rtol=1e-5, atol=1e-6)
    leaf = image.clone().requires_grad_()
    (model(leaf) * weights).sum().backward()
    torch.testing.assert_close((leaf.grad * direction).sum(), (tangent * weights).sum(), rtol=1e-9, atol=0)
    assert out.shape == image.shape


def test_every_weight_gets_a_gradient():
    model = tiny_autoencoder("published").train()
    model(torch.rand(1, 3, 16, 16)).square().mean().backward()
    missing = [
        name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()
    ]
    assert missing == []
