"""Folders with random weights that both checkouts read, written by the old one in the published layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from sana_sprint import (
    AutoencoderDC,
    SanaControlNetModel,
    SanaSprintControlNetPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)

FOLDER = Path()  # set by the probe
RES, VIT = "ResBlock", "EfficientViTBlock"

# ----- transformers ---------------------------------------------------------------------------------------------------

_TINY: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "num_layers": 3,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 12,
    "cross_attention_dim": 24,
    "caption_channels": 10,
    "sample_size": 8,
}
_NORM = {"qk_norm": "rms_norm_across_heads"}
# Each field away from its usual value; "large" has grids that are computed in pieces on a CPU.
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "sprint": {**_TINY, **_NORM, "guidance_embeds": True},
    "teacher": {**_TINY, **_NORM, "timestep_scale": 0.001},
    "plain": _TINY,
    "patch2": {**_TINY, **_NORM, "patch_size": 2, "guidance_embeds": True, "guidance_embeds_scale": 0.3},
    "positions": {**_TINY, "interpolation_scale": 2.0, "guidance_embeds": True},
    "affine": {**_TINY, "attention_bias": True, "norm_elementwise_affine": True, "norm_eps": 1e-3},
    "odd": {**_TINY, **_NORM, "num_layers": 1, "mlp_ratio": 2.7, "cross_attention_head_dim": 7},
    "large": {
        **_TINY,
        **_NORM,
        "num_attention_heads": 8,
        "attention_head_dim": 32,
        "num_layers": 2,
        "num_cross_attention_heads": 4,
        "cross_attention_head_dim": 48,
        "cross_attention_dim": 256,
        "guidance_embeds": True,
    },
}
GRIDS = {"large": (64, 48)}  # the others have 8 x 12

# ----- autoencoders ---------------------------------------------------------------------------------------------------


def _sides(**fields: Any) -> dict[str, Any]:
    return {f"{side}_{name}": value for name, value in fields.items() for side in ("encoder", "decoder")}


_SMALL: dict[str, Any] = {
    "latent_channels": 4,
    "attention_head_dim": 4,
    **_sides(block_out_channels=(8, 16, 16), layers_per_block=(1, 1, 1), qkv_multiscales=((), (), ())),
}
_BY_CONV = {"downsample_block_type": "conv", "upsample_block_type": "interpolate"}
# Wide enough for minimal filtering (from 128 channels), narrow enough at stage 0 for strips without it.
_LARGE: dict[str, Any] = {
    "latent_channels": 8,
    "attention_head_dim": 32,
    **_sides(
        block_out_channels=(96, 128, 128),
        layers_per_block=(1, 1, 1),
        block_types=(RES, VIT, RES),
        qkv_multiscales=((), (5,), ()),
    ),
}
AUTOENCODERS: dict[str, dict[str, Any]] = {
    "res_shuffle": _SMALL,
    "mixed_conv": {
        **_SMALL,
        **_BY_CONV,
        **_sides(block_types=(RES, VIT, VIT), qkv_multiscales=((), (5,), (3, 5))),
    },
    "vit_shuffle": {
        **_SMALL,
        "attention_head_dim": 3,
        **_sides(block_types=VIT, qkv_multiscales=((3,), (), (5,))),
    },
    "skip_first": {**_SMALL, **_sides(layers_per_block=(0, 1, 2))},
    "skip_first_conv": {**_SMALL, **_BY_CONV, **_sides(layers_per_block=(0, 1, 2))},
    "groups_conv": {
        **_SMALL,
        **_BY_CONV,
        **_sides(block_out_channels=(32, 8, 32, 16), layers_per_block=(1,) * 4, qkv_multiscales=((),) * 4),
    },
    "norms": {
        **_SMALL,
        "decoder_norm_types": ("batch_norm", "rms_norm", "batch_norm"),
        "decoder_act_fns": ("relu6", "gelu", "mish"),
        "decoder_conv_act_fn": "silu",
        "encoder_out_shortcut": False,
        "decoder_in_shortcut": False,
        "latent_channels": 5,
    },
    "large_shuffle": _LARGE,
    "large_conv": {**_LARGE, **_BY_CONV},
}


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights that exercise every term: no norm at one, no bias at zero, activations of about unit size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            else:
                size = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
                parameter.copy_(size * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0, generator=generator)
    return model.eval()


def _build(cls: Any, values: dict[str, Any], seed: int) -> Any:
    return randomize(cls(cls.config_class(**values)), seed)


def _save(folder: Path, **components: Any) -> None:
    names = ("tokenizer", "text_encoder", "vae", "transformer")
    cls = SanaSprintControlNetPipeline if "controlnet" in components else SanaSprintPipeline
    given = {**dict.fromkeys(names), "scheduler": SCMScheduler(), **components}
    cls(**given).save_pretrained(folder)


def make(folder: Path) -> None:
    """Writes all folders and pictures."""
    for name, values in TRANSFORMERS.items():
        _save(folder / "transformers" / name, transformer=_build(SanaTransformer2DModel, values, 2))
    for name, values in AUTOENCODERS.items():
        _save(folder / "autoencoders" / name, vae=_build(AutoencoderDC, values, 1))
    for topology in ("diffusers", "official"):
        _make_controlled(folder / "controlled" / topology, topology)
    _make_lora(folder)
    make_pictures(folder / "pictures")


def _make_controlled(folder: Path, topology: str) -> None:
    """The embedded model's texts with a random transformer, branch and autoencoder of few channels."""
    emoji = SanaSprintPipeline.from_pretrained("emoji")
    values = {**TRANSFORMERS["sprint"], "caption_channels": emoji.transformer.config.caption_channels}
    transformer = _build(SanaTransformer2DModel, values, 2)
    branch = SanaControlNetModel.from_transformer(transformer, 2, topology)
    _save(
        folder,
        tokenizer=emoji.tokenizer,
        text_encoder=emoji.text_encoder,
        transformer=transformer,
        vae=_build(AutoencoderDC, AUTOENCODERS["mixed_conv"], 1),
        controlnet=randomize(branch, 3),
    )


def _make_lora(folder: Path) -> None:
    """Two LoRAs for the embedded transformer: peft's keys, and kohya's with an alpha."""
    weights = SanaSprintPipeline.from_pretrained("emoji").transformer.state_dict()
    layers = [f"transformer_blocks.{i}.{name}" for i in (0, 3) for name in ("attn1.to_q", "attn2.to_v")]
    generator = torch.Generator().manual_seed(4)
    peft, kohya = {}, {}
    for layer in layers:
        outputs, inputs = weights[f"{layer}.weight"].shape
        down, up = torch.randn(4, inputs, generator=generator), torch.randn(outputs, 4, generator=generator)
        peft[f"transformer.{layer}.lora_A.weight"] = 0.05 * down
        peft[f"transformer.{layer}.lora_B.weight"] = 0.05 * up
        name = f"lora_transformer_{layer.replace('.', '_')}"
        kohya[f"{name}.lora_down.weight"] = 0.05 * down.flip(0)
        kohya[f"{name}.lora_up.weight"] = 0.05 * up.flip(1)
        kohya[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(peft, folder / "peft.safetensors")
    save_file(kohya, folder / "kohya.safetensors")


# ----- pictures -------------------------------------------------------------------------------------------------------


def make_pictures(folder: Path) -> None:
    """Sketches and photographs of every sort that a user brings along."""
    folder.mkdir(parents=True)
    _sketch((150, 130), "white", "black").save(folder / "sketch.png")
    _sketch((700, 500), "black", "yellow").save(folder / "dark.png")
    _sketch((300, 420), (0, 0, 0, 0), (255, 255, 255, 255), "RGBA").save(folder / "transparent.png")
    _sketch((180, 120), 255, 60, "L").save(folder / "grey.png")
    photo = _photo(260, 200)
    photo.save(folder / "photo.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    photo.save(folder / "turned.jpg", exif=turned)


def _sketch(size: tuple[int, int], ground: Any, ink: Any, mode: str = "RGB") -> Image.Image:
    width, height = size
    picture = Image.new(mode, size, ground)
    draw = ImageDraw.Draw(picture)
    draw.ellipse(
        (width // 5, height // 5, 4 * width // 5, 3 * height // 4), outline=ink, width=max(2, width // 60)
    )
    draw.line((5, height - 9, width - 7, height // 2), fill=ink, width=3)
    return picture


def _photo(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width].astype(np.float64)
    inside = (x - 0.4 * width) ** 2 + (y - 0.5 * height) ** 2 < (0.3 * height) ** 2
    channels = [20 + 80 * x / width + 140 * inside, 230 - 190 * inside, 90 + 60 * np.sin(y / 9) + 40 * inside]
    return Image.fromarray(np.stack(channels, axis=2).round().clip(0, 255).astype(np.uint8))
