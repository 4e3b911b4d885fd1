"""Fused kernels against the plain layers in fp64, run by Triton's interpreter, and when a block uses them.

Rounding a result once to a dtype of unit roundoff u (fp32 2^-24, fp16 2^-11, bf16 2^-8) errs by at most u of each value,
about u/2 in norm; Triton's interpreter cuts bf16 off instead, which doubles that. The bounds are small multiples of u.
"""

import copy
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from sana_sprint import backends
from sana_sprint.backends.cpu import subpixel
from sana_sprint.backends.cuda import device
from sana_sprint.backends.explicit_attention import set_fused_attention
from sana_sprint.models.autoencoder import AutoencoderConfig, AutoencoderDC
from sana_sprint.models.dc_blocks import ChannelRMSNorm, ResBlock
from sana_sprint.models.layers import GatedConvFeedForward, LinearSelfAttention, RMSNorm, modulate
from sana_sprint.models.transformer import SanaTransformer2DModel, TransformerConfig
from tests.helpers.autoencoders import AUTOENCODERS, tiny_autoencoder
from tests.helpers.models import TRANSFORMERS, randomize
from tests.helpers.text import tiny_text_encoder

pytest.importorskip("triton", reason="fused kernels need Triton")

from sana_sprint.backends.cuda.kernels import norms, pixels
from sana_sprint.backends.cuda.kernels.attention import linear_attention
from sana_sprint.backends.cuda.kernels.convolution import depthwise5, gated_depthwise
from sana_sprint.backends.cuda.kernels.norms import gated_sum, modulated_norm, rms_norm
from sana_sprint.quantize import rounding
from sana_sprint.quantize.layers import QuantizedLinear
from sana_sprint.quantize.models import quantize_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
B, D = 2, 24


def roundoff(dtype):
    return torch.finfo(dtype).eps / 2


def error(out, reference):
    return float((out.double() - reference.double()).norm() / reference.double().norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_delta", [False, True])
def test_norm_and_modulation_with_a_sum_before(dtype, has_delta):
    x, delta = (torch.randn(B, 3, D).to(dtype) + 2 for _ in range(2))
    shift, scale = torch.randn(B, 6, D).to(dtype).unbind(1)[1:3]
    total, out = modulated_norm(x, shift, scale, 1e-6, delta if has_delta else None)
    # The interpreter cuts bf16 off where a GPU rounds: one unit in the last place.
    torch.testing.assert_close(total, x + delta if has_delta else x, rtol=2 * roundoff(dtype), atol=0)
    normed = F.layer_norm(total.double(), (D,), eps=1e-6)
    reference = modulate(normed, shift.double()[:, None], scale.double()[:, None])
    assert error(out, reference) < 3 * roundoff(dtype)  # fp32 sums, then one rounding
    assert out.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype):
    norm = RMSNorm(D, 1e-5)
    randomize(norm)
    x = 3 * torch.randn(B, 3, D).to(dtype)
    norm = norm.to(dtype).requires_grad_(False)
    out = rms_norm(x, norm.weight, norm.eps)
    # The plain layer rounds once too, so most values are the same and the others one unit apart.
    torch.testing.assert_close(out, norm(x), rtol=4 * roundoff(dtype), atol=0)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_attention(dtype, qk_norm, monkeypatch):
    monkeypatch.setattr("sana_sprint.backends.cuda.kernels.attention.TOKENS_PER_SPLIT", 16)
    num_heads, tokens = 2, 21  # two splits, the second of them half empty; 12 channels a head, padded to 16
    layer = LinearSelfAttention(D, D, num_heads, bias=False, qk_norm=qk_norm, dropout=0.0)
    randomize(layer)
    layer = layer.to(dtype).requires_grad_(False)
    q, k, v = (torch.randn(1, tokens, D).to(dtype) for _ in range(3))
    norms = (layer.norm_q.weight, layer.norm_k.weight, layer.norm_q.eps) if qk_norm else None
    out = linear_attention(q, k, v, num_heads, eps=1e-15, norms=norms, block_n=16)
    q, k = (x.double().relu().view(tokens, num_heads, -1) for x in (layer.norm_q(q), layer.norm_k(k)))
    weights = torch.einsum("nhe,mhe->hnm", q, k)
    weights = weights / weights.sum(-1, keepdim=True)
    reference = torch.einsum("hnm,mhe->nhe", weights, v.double().view(tokens, num_heads, -1)).reshape(
        1, tokens, D
    )
    # With norms, a value on the border of two roundings may fall on the other side than the plain layer's.
    assert error(out, reference) < (8 if qk_norm else 3) * roundoff(dtype)
    assert out.dtype == dtype


def test_linear_attention_shows_a_nan():
    q, k, v = (torch.randn(1, 4, D) for _ in range(3))
    k[0, 1, 3] = float("nan")
    out = linear_attention(q, k, v, 3, eps=1e-15, block_n=16)
    assert bool(out[0, :, :8].isnan().any(-1).all())  # the head that it is in, every token
    assert bool(out[0, :, 8:].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_depthwise_convolution_and_gate(dtype):
    height, width, hidden = 3, 5, 6  # odd sides: half-empty columns, rows and channels
    layer = GatedConvFeedForward(D, hidden / D)
    randomize(layer)
    layer = layer.to(dtype).requires_grad_(False)
    x = torch.randn(1, height * width, 2 * hidden).to(dtype)
    weight, bias = layer.conv_depth.weight, layer.conv_depth.bias
    out = gated_depthwise(x, weight, bias, (height, width), block_c=8, rows=2)
    image = F.silu(x.double()).view(1, height, width, -1).permute(0, 3, 1, 2)
    image = F.conv2d(image, weight.double(), bias.double(), padding=1, groups=2 * hidden)
    value, gate = image.permute(0, 2, 3, 1).flatten(1, 2).chunk(2, dim=-1)
    assert error(out, value * F.silu(gate)) < 3 * roundoff(dtype)  # fp32 inside, one rounding
    assert out.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("height", "width"), [(3, 5), (5, 8), (1, 1)])
def test_depthwise_convolution_of_five(dtype, height, width):
    x, weight = channels_last(B, D, height, width, dtype=dtype), torch.randn(D, 1, 5, 5).to(dtype)
    out = depthwise5(x, weight, block_c=16, rows=2)
    reference = F.conv2d(x.double(), weight.double(), padding=2, groups=D)
    assert error(out, reference) < 3 * roundoff(dtype)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_sum(dtype):
    x, change = (torch.randn(B, 3, D).to(dtype) for _ in range(2))
    gate = torch.randn(B, 6, D).to(dtype)[:, 2]
    reference = x.double() + gate.double()[:, None] * change.double()
    assert error(gated_sum(x, gate, change), reference) < 3 * roundoff(dtype)


# ----- a block --------------------------------------------------------------------------------------------------------


def tiny_model(name="sprint", **fields):
    model = SanaTransformer2DModel(TransformerConfig(**{**TRANSFORMERS[name], "num_layers": 1, **fields}))
    randomize(model)
    return model.eval()


def inputs(model, side=2):
    latent = torch.randn(1, model.config.in_channels, side, side)
    with torch.no_grad():
        context = model.encode_caption(torch.randn(1, 3, model.config.caption_channels))
    guidance = torch.tensor([4.5]) if model.config.guidance_embeds else None
    return latent, torch.tensor([0.8]), context, guidance


@pytest.fixture
def on_any_device(monkeypatch):
    monkeypatch.setattr(device, "runs_on", lambda device: True)


def counted(monkeypatch, module, name):
    """The calls of a kernel from now on."""
    calls, run = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **named: calls.append(args) or run(*args, **named))
    return calls


@pytest.mark.parametrize("name", ["sprint", "plain"])
@pytest.mark.usefixtures("on_any_device")
def test_a_fused_model_is_the_plain_one(name, monkeypatch):
    model = tiny_model(name)
    arguments = inputs(model)
    calls = counted(monkeypatch, norms, "gated_sum")
    with torch.no_grad():
        plain = model(*arguments)
        backends.use_kernels(model)
        assert error(model(*arguments), plain) < 64 * roundoff(
            torch.float32
        )  # two dozen fp32 operations in other orders
        assert len(calls) == 2  # for each branch of the block
        backends.use_kernels(model, False)
        assert torch.equal(model(*arguments), plain)
    assert len(calls) == 2


@pytest.mark.parametrize("case", ["grad", "autocast", "affine", "plain attention", "fp64", "cpu"])
def test_where_kernels_do_not_apply_the_plain_path_runs(case, monkeypatch):
    if case != "cpu":
        monkeypatch.setattr(device, "runs_on", lambda device: True)
    model = tiny_model("biases_and_affine" if case == "affine" else "sprint")
    if case == "fp64":
        model = model.double()
    set_fused_attention(model.blocks, case != "plain attention")
    arguments = inputs(model)
    plain = copy.deepcopy(model)
    backends.use_kernels(model)
    with torch.set_grad_enabled(case == "grad"), torch.autocast("cpu", enabled=case == "autocast"):
        assert torch.equal(model(*arguments), plain(*arguments))


def test_without_triton_the_switch_says_so(monkeypatch):
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    model = tiny_model()
    with pytest.raises(ValueError, match="pip install triton"):
        backends.use_kernels(model)
    backends.use_kernels(model, False)


# ----- an autoencoder -------------------------------------------------------------------------------------------------


def channels_last(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adds", [False, True])
def test_norm_of_pixels(dtype, adds):
    norm = ChannelRMSNorm(D)
    randomize(norm)
    norm = norm.to(dtype).requires_grad_(False)
    change, x = (channels_last(B, D, 3, 5, dtype=dtype) for _ in range(2))
    out = pixels.rms_norm(change, norm.weight, norm.bias, norm.eps, add_to=x if adds else None)
    reference = copy.deepcopy(norm).double()(change.double()) + (x.double() if adds else 0)
    assert error(out, reference) < 3 * roundoff(dtype)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    activated = pixels.rms_norm(
        change, norm.weight, norm.bias, norm.eps, add_to=x if adds else None, relu=True
    )
    assert torch.equal(activated, out.relu())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "repeats"), [(24, None), (24, 1), (12, 2), (48, 3), (16, 4)])
def test_phases_in_their_places(dtype, inputs, repeats):
    conv = torch.nn.Conv2d(inputs, inputs * (repeats or 1) // 4, 3, padding=1)
    conv = conv.to(dtype).requires_grad_(False)
    x, kernels = channels_last(B, inputs, 3, 5, dtype=dtype), subpixel.phase_kernels(conv.weight)
    phases = F.conv2d(x, kernels, padding=1).contiguous(memory_format=torch.channels_last)
    out = pixels.interleave(phases, conv.bias, x if repeats else None, repeats or 1)
    exact, wide, biases = (tensor.double() for tensor in (x, kernels, conv.bias.repeat(4)))
    convolve = partial(F.conv2d, weight=wide, bias=biases, padding=(0, 1))
    expected = subpixel.upsample(exact, convolve, len(conv.bias), repeats)
    assert error(out, expected) < 4 * roundoff(dtype)  # the convolution's rounding, then one
    assert out.is_contiguous(memory_format=torch.channels_last)
    out = pixels.interleave(phases.float(), None, None, 1)  # nothing added: every number in its place
    assert torch.equal(out, upsample_of(phases.float()))


def upsample_of(phases):
    """Each phase (B,C,H+1,W+1) from its own first row and column on, in its places of the large grid."""
    parts = phases.unflatten(1, (2, 2, -1))
    rows, columns = phases.shape[2] - 1, phases.shape[3] - 1
    out = phases.new_empty(len(phases), parts.shape[3], 2 * rows, 2 * columns)
    for a in range(2):
        for b in range(2):
            out[:, :, a::2, b::2] = parts[:, a, b, :, a : a + rows, b : b + columns]
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_and_silu(dtype):
    x, bias = channels_last(B, D, 3, 5, dtype=dtype), torch.randn(D).to(dtype)
    reference = F.silu(x.double() + bias.double()[:, None, None])
    assert error(pixels.silu(x, bias), reference) < 3 * roundoff(dtype)


@pytest.mark.parametrize("name", list(AUTOENCODERS))
@pytest.mark.usefixtures("on_any_device")
@torch.no_grad()
def test_a_fused_autoencoder_is_the_plain_one(name, monkeypatch):
    model = tiny_autoencoder(name)
    ratio = model.spatial_compression_ratio
    picture = torch.randn(1, model.config.in_channels, 4 * ratio, 2 * ratio)
    latent = model.encode(picture)
    plain = model.decode(latent)
    backends.use_kernels(model)
    normed, activated = (counted(monkeypatch, pixels, kernel) for kernel in ("rms_norm", "silu"))
    assert error(model.encode(picture), latent) < 64 * roundoff(torch.float32)
    assert error(model.decode(latent), plain) < 64 * roundoff(torch.float32)
    assert len(normed) > 0
    # Of activations there is a kernel for the published one.
    blocks = [module for module in model.modules() if isinstance(module, ResBlock)]
    assert len(activated) == sum(isinstance(block.nonlinearity, torch.nn.SiLU) for block in blocks)
    backends.remove(model)
    assert torch.equal(model.decode(latent), plain)


@pytest.mark.usefixtures("on_any_device")
@torch.no_grad()
def test_a_fused_autoencoder_may_be_quantised():
    model = backends.apply(tiny_autoencoder("published"))
    quantize_model(model, "vae", "int8-weights")
    latent = torch.randn(1, 4, 4, 2)
    plain = model.decode(latent)
    backends.use_kernels(model)
    assert error(model.decode(latent), plain) < 64 * roundoff(torch.float32)


@torch.no_grad()
def test_an_autoencoder_on_a_cpu_stays_as_it_is():
    model = backends.apply(tiny_autoencoder())
    latent = torch.randn(1, model.config.latent_channels, 2, 2)
    expected = model.decode(latent)
    backends.use_kernels(model)
    assert torch.equal(model.decode(latent), expected)


# ----- a text encoder -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_any_device")
@torch.no_grad()
def test_a_fused_text_encoder_is_the_plain_one(monkeypatch):
    model = tiny_text_encoder()
    randomize(model)
    tokens = torch.arange(7)[None]
    plain = model(tokens).last_hidden_state
    backends.use_kernels(model)
    calls = counted(monkeypatch, norms, "rms_norm")
    assert error(model(tokens).last_hidden_state, plain) < 64 * roundoff(torch.float32)
    assert len(calls) == 4 * model.config.num_hidden_layers + 1
    with torch.enable_grad():
        assert torch.equal(model(tokens).last_hidden_state, plain)
    backends.use_kernels(model, False)
    assert torch.equal(model(tokens).last_hidden_state, plain)


# ----- rounding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_rounded_to_whole_numbers(dtype):
    x = torch.randn(5, 24).to(dtype)
    x[2] = 0
    codes, step = rounding.round_rows(x, torch.int8, 127, 1e-30)
    expected = x.float().abs().amax(1, keepdim=True) / 127
    torch.testing.assert_close(step[[0, 1, 3, 4]], expected[[0, 1, 3, 4]], rtol=1e-6, atol=0)
    ratio = x.float() / step
    assert torch.equal(codes.float(), ratio.round())
    assert float(codes.abs().amax()) == 127
    ties = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert rounding.round_rows(ties, torch.int8, 127, 1e-30)[0].tolist() == [[127, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_codes_scaled_back(dtype):
    sums, step = torch.randint(-(2**20), 2**20, (5, 24), dtype=torch.int32), torch.rand(5, 1)
    scale = torch.rand(24).to(dtype)
    assert error(rounding.scale_sums(sums, step, scale), sums.double() * step * scale) < 2 * roundoff(dtype)


# ----- on the device --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_published_shapes_on_the_gpu(dtype):
    config = TransformerConfig(num_layers=1, guidance_embeds=True, qk_norm="rms_norm_across_heads")
    model = SanaTransformer2DModel(config)
    randomize(model)
    model = model.to("cuda").eval()
    latent, text = torch.randn(2, 32, 32, 24).cuda(), torch.randn(2, 20, 2304).cuda()
    times, guidance = torch.tensor([0.8, 0.3]).cuda(), torch.tensor([4.5, 1.0]).cuda()
    exact = copy.deepcopy(model).double()
    context = exact.encode_caption(text.double())
    reference = exact(latent.double(), times.double(), context, guidance.double())
    model = model.to(dtype)
    context = model.encode_caption(text.to(dtype))
    plain = error(model(latent, times, context, guidance), reference)
    backends.use_kernels(model)
    # Fewer roundings than on the plain path; the margin is for values that fall on the other side of one.
    assert error(model(latent, times, context, guidance), reference) < 1.2 * plain


@pytest.mark.gpu
@torch.no_grad()
def test_an_autoencoder_on_the_gpu():
    model = AutoencoderDC(AutoencoderConfig(**AUTOENCODERS["published"]))
    randomize(model)
    model = model.to("cuda").eval()
    picture = torch.randn(2, 3, 64, 96, device="cuda")
    exact = copy.deepcopy(model).double()
    latent = exact.encode(picture.double())
    reference = exact.decode(latent)
    model = model.bfloat16()
    plain = [
        error(model.encode(picture.bfloat16()), latent),
        error(model.decode(latent.bfloat16()), reference),
    ]
    backends.use_kernels(model)
    fused_ones = [
        error(model.encode(picture.bfloat16()), latent),
        error(model.decode(latent.bfloat16()), reference),
    ]
    assert all(mine < 1.2 * other for mine, other in zip(fused_ones, plain, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["int8", "fp8"])
@torch.no_grad()
def test_products_of_8_bits_on_the_gpu(preset):
    layer = torch.nn.Linear(256, 128).bfloat16().cuda()
    quantized = QuantizedLinear.of(layer, preset)
    x = torch.randn(40, 256, device="cuda").bfloat16()
    reference = F.linear(x.double(), quantized.weight.double(), layer.bias.double())
    assert (
        error(quantized(x), reference) < {"int8": 0.01, "fp8": 0.03}[preset]
    )  # rounding x, 8 bits or 4 of mantissa
