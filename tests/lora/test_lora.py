"""LoRAs change pictures as the published pipeline's do, are read strictly, and leave without a trace."""

import json

import pytest
import torch
from safetensors.torch import save_file

from sana_sprint.models.transformer import SanaTransformer2DModel, TransformerConfig
from sana_sprint.pipelines.text_to_image import SanaSprintPipeline
from tests.helpers.pipeline import PROMPT, TRANSFORMER, published_pipeline, tiny_pipeline

RANK = 3
# Every kind of layer: attention of both sorts, the 1x1 convolutions, caption, time, guidance, first and last.
LAYERS = (
    "transformer_blocks.0.attn1.to_q",
    "transformer_blocks.1.attn1.to_out.0",
    "transformer_blocks.0.attn2.to_k",
    "transformer_blocks.2.attn2.to_v",
    "transformer_blocks.1.ff.conv_inverted",
    "transformer_blocks.2.ff.conv_point",
    "caption_projection.linear_1",
    "time_embed.timestep_embedder.linear_1",
    "time_embed.guidance_embedder.linear_2",
    "time_embed.linear",
    "patch_embed.proj",
    "proj_out",
)


def random_lora(layers=LAYERS, seed=0, names=("lora_A", "lora_B"), prefix="transformer."):
    model = SanaTransformer2DModel(TransformerConfig(**TRANSFORMER))
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for layer in layers:
        weight = model.get_submodule(layer).weight
        ones = (1, 1) if weight.ndim == 4 else ()
        down, up = (RANK, weight.shape[1], *ones), (weight.shape[0], RANK, *ones)
        for name, shape in zip(names, (down, up), strict=True):
            state[f"{prefix}{layer}.{name}.weight"] = 0.3 * torch.randn(shape, generator=generator)
    return state


def latents(pipe, **arguments):
    return pipe(PROMPT, seed=1, output_type="latent", **arguments).images


@pytest.fixture
def pipe():
    return tiny_pipeline()


# ----- the same as the reference --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_it_draws_what_the_published_pipeline_draws(tmp_path, pipe, scale):
    pytest.importorskip("peft")
    alpha = 2.0 * RANK
    settings = {
        "transformer.r": RANK,
        "transformer.lora_alpha": alpha,
        "transformer.target_modules": list(LAYERS),
    }
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(random_lora(), file, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(settings)})
    theirs = published_pipeline()
    theirs.load_lora_weights(tmp_path)
    pipe.load_lora_weights(tmp_path)
    plain = latents(tiny_pipeline())
    arguments = {
        "prompt": PROMPT,
        "output_type": "latent",
        "attention_kwargs": {"scale": scale},
        "height": 32,  # it has buckets for one native size only
        "width": 32,
        "use_resolution_binning": False,
    }
    expected = theirs(**arguments, generator=torch.Generator().manual_seed(1)).images
    found = pipe(**arguments, generator=torch.Generator().manual_seed(1)).images
    # They add the halves' product to the layer's result, here it is in the weight: fp32 rounding, through two steps.
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    assert (found - plain).abs().max() > 0.05, "the LoRA does too little to tell"


# ----- strengths ------------------------------------------------------------------------------------------------------


def test_everything_can_be_taken_back_bit_for_bit(pipe):
    before = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    plain = latents(pipe)
    pipe.load_lora_weights(random_lora(), adapter_name="style")
    changed = latents(pipe)
    assert not torch.equal(changed, plain)
    pipe.fuse_lora(0.5)
    pipe.unfuse_lora()
    assert torch.equal(latents(pipe), changed)
    pipe.set_adapters("style", 0.0)
    assert torch.equal(latents(pipe), plain)
    pipe.unload_lora_weights()
    assert pipe.get_active_adapters() == []
    for key, value in pipe.transformer.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_adapters_add_up_in_any_order(pipe):
    one, two = random_lora(seed=1), random_lora(LAYERS[:4], seed=2)
    pipe.load_lora_weights(one, adapter_name="one")
    pipe.load_lora_weights(two, adapter_name="two")
    pipe.set_adapters(["one", "two"], [0.5, -0.25])
    weight = pipe.transformer.get_submodule(LAYERS[0]).weight
    original = tiny_pipeline().transformer.get_submodule(LAYERS[0]).weight
    key = f"transformer.{LAYERS[0]}.lora"
    delta = 0.5 * one[f"{key}_B.weight"] @ one[f"{key}_A.weight"]
    delta = delta - 0.25 * two[f"{key}_B.weight"] @ two[f"{key}_A.weight"]
    torch.testing.assert_close(weight, original + delta)
    assert pipe.get_active_adapters() == ["one", "two"]


def test_a_scale_is_the_call_s_alone(pipe):
    pipe.load_lora_weights(random_lora(), adapter_name="style")
    full = latents(pipe)
    half = latents(pipe, attention_kwargs={"scale": 0.5})
    assert torch.equal(latents(pipe), full)
    pipe.set_adapters("style", 0.5)
    assert torch.equal(latents(pipe), half)
    pipe.unload_lora_weights()
    assert torch.equal(latents(tiny_pipeline()), latents(pipe))


def test_fused_weights_stay_when_the_adapters_are_unloaded_and_are_saved(tmp_path, pipe):
    pipe.load_lora_weights(random_lora())
    pipe.fuse_lora(0.7)
    fused = latents(pipe)
    with pytest.raises(ValueError, match="unfuse_lora first"):
        latents(pipe, attention_kwargs={"scale": 0.5})
    pipe.unload_lora_weights()
    assert torch.equal(latents(pipe), fused)
    pipe.save_pretrained(tmp_path)
    saved = SanaSprintPipeline.from_pretrained(tmp_path).transformer.state_dict()
    for key, value in pipe.transformer.state_dict().items():
        assert torch.equal(saved[key], value), key


def test_a_cast_after_loading_keeps_the_addition_and_the_way_back(pipe):
    pipe.load_lora_weights(random_lora())
    pipe.to(torch.bfloat16)
    pipe.unload_lora_weights()
    plain = tiny_pipeline().to(torch.bfloat16).transformer.state_dict()
    for key, value in pipe.transformer.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, plain[key]), key


def test_a_picture_does_not_depend_on_its_batch(pipe):
    pipe.load_lora_weights(random_lora())
    batch = pipe([PROMPT, "a cat"], seed=[1, 2], output_type="latent").images
    # Matrix products of other shapes sum in another order: fp32 rounding.
    torch.testing.assert_close(batch[:1], latents(pipe), rtol=1e-4, atol=1e-4)


# ----- other spellings ------------------------------------------------------------------------------------------------


def test_kohya_s_keys_and_alpha(pipe):
    state = random_lora(names=("lora_down", "lora_up"), prefix="")
    spelt = {
        f"lora_transformer_{layer.replace('.', '_')}.{half}.weight": state[f"{layer}.{half}.weight"]
        for layer in LAYERS
        for half in ("lora_down", "lora_up")
    }
    spelt |= {f"lora_transformer_{layer.replace('.', '_')}.alpha": torch.tensor(1.5) for layer in LAYERS}
    pipe.load_lora_weights(spelt)
    found = latents(pipe)
    other = tiny_pipeline()
    other.load_lora_weights(random_lora(), adapter_name="style")
    other.set_adapters("style", 1.5 / RANK)
    # alpha / rank goes into the product at another place: fp32 rounding through 2 steps.
    torch.testing.assert_close(found, latents(other), rtol=1e-4, atol=1e-4)


def test_peft_s_folder(tmp_path, pipe):
    config = {"r": RANK, "lora_alpha": 6, "use_rslora": True, "alpha_pattern": {"attn1.to_q": 12}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(random_lora(prefix="base_model.model."), tmp_path / "adapter_model.safetensors")
    pipe.load_lora_weights(tmp_path)
    for layer, alpha in ((LAYERS[0], 12), (LAYERS[2], 6)):
        state, key = random_lora(), f"transformer.{layer}.lora"
        delta = alpha / RANK**0.5 * state[f"{key}_B.weight"] @ state[f"{key}_A.weight"]
        original = tiny_pipeline().transformer.get_submodule(layer).weight
        torch.testing.assert_close(pipe.transformer.get_submodule(layer).weight, original + delta)


# ----- refusals -------------------------------------------------------------------------------------------------------

KEY = f"transformer.{LAYERS[0]}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer.blocks.7.to_q.lora_A.weight": torch.ones(2, 2)}, "lacks: transformer.blocks.7"),
        ({"text_encoder.q_proj.lora_A.weight": torch.ones(2, 2)}, "lacks: text_encoder"),
        ({f"{KEY}.dora_scale": torch.ones(24)}, "not keys of a LoRA.*dora_scale"),
        ({f"{KEY}.lora_A.weight": torch.ones(RANK, 5)}, r"to_q has shapes \(3, 5\)"),
        ({f"{KEY}.lora_B.weight": torch.ones(24, 2)}, r"needs \(rank, 24\) and \(24, rank\)"),
        ({f"{KEY}.lora_B.weight": None}, "to_q has no up matrix"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(pipe, change, message):
    state = {key: value for key, value in {**random_lora(), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights(state)
    assert pipe.get_active_adapters() == []


def test_misuse_is_refused(tmp_path, pipe):
    with pytest.raises(ValueError, match="no LoRA is loaded"):
        pipe.fuse_lora()
    with pytest.raises(ValueError, match="nothing in it matches"):
        pipe.load_lora_weights({})
    with pytest.raises(ValueError, match="no such LoRA"):
        pipe.load_lora_weights(tmp_path / "absent")
    with pytest.raises(ValueError, match="choose one by weight_name"):
        pipe.load_lora_weights(tmp_path)
    pipe.load_lora_weights(random_lora(), adapter_name="style")
    with pytest.raises(ValueError, match="loaded already"):
        pipe.load_lora_weights(random_lora(), adapter_name="style")
    with pytest.raises(ValueError, match="no LoRA named 'stile'; loaded: style"):
        pipe.set_adapters("stile")
    with pytest.raises(ValueError, match="one weight per LoRA"):
        pipe.set_adapters(["style"], [1.0, 2.0])
    with pytest.raises(ValueError, match="finite number"):
        latents(pipe, attention_kwargs={"scale": float("nan")})
