"""PromptEncoder equals the published padded encoding, runs only new tokens and uses no stale keys and values."""

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma2Model,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from sana_sprint.models.text_encoder import (
    MAX_PREFIXES,
    PromptEmbeddings,
    PromptEncoder,
    load_text_encoder,
    load_tokenizer,
)
from sana_sprint.prompts import COMPLEX_HUMAN_INSTRUCTION
from tests._text import INSTRUCTION, merging_tokenizer, save_tiny_text, tiny_text_encoder, tiny_tokenizer

PROMPTS = [
    "",
    "a",
    "A Cat ",
    "a tiny astronaut hatching from an egg on the moon",
    "zebra crossing, 3 dogs\nand more " * 6,
]
# fp32, values up to about 4, four layers: the two sides sum the same numbers in other orders (5e-6 seen).
FP32_ATOL = 2e-5


def padded_reference(
    encoder: PromptEncoder, prompts: Sequence[str], length: int, instruction: Sequence[str] | None
) -> tuple[Tensor, Tensor]:
    """The published procedure: pad to the full length, run everything, select bos and the last positions."""
    front = "\n".join(instruction or ())
    total = len(encoder.tokenizer.encode(front)) + length - 2 if front else length
    tokens = encoder.tokenizer(
        [front + prompt.lower().strip() for prompt in prompts],
        padding="max_length",
        max_length=total,
        truncation=True,
        return_tensors="pt",
    )
    hidden = encoder.text_encoder(
        input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
    ).last_hidden_state
    positions = [0, *range(total - length + 1, total)]
    return hidden[:, positions], tokens.attention_mask[:, positions].bool()


def assert_equals_reference(
    ours: PromptEmbeddings, reference: tuple[Tensor, Tensor], *, atol: float = FP32_ATOL
) -> None:
    embeds, mask = reference
    L = ours.mask.shape[1]
    assert ours.embeds.shape == (*ours.mask.shape, embeds.shape[-1])
    assert mask.sum(1).max() == L
    assert torch.equal(ours.mask, mask[:, :L])
    assert ours.num_tokens == tuple(mask.sum(1).tolist())
    torch.testing.assert_close(ours.embeds[ours.mask], embeds[mask], atol=atol, rtol=0)
    assert not ours.embeds[~ours.mask].any()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine two threads wait for each other at every one of a tiny model's many operations."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def encoder() -> PromptEncoder:
    return PromptEncoder(tiny_tokenizer(), tiny_text_encoder())


@pytest.fixture
def runs(encoder: PromptEncoder) -> list[tuple[int, ...]]:
    """The shapes of the token batches that the model is run on."""
    return record_runs(encoder.text_encoder)


def record_runs(model: Gemma2Model) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


# ----- equal to the published encoding ----------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 9, 300])
@pytest.mark.parametrize(
    "instruction", [None, INSTRUCTION, COMPLEX_HUMAN_INSTRUCTION], ids=["none", "short", "published"]
)
@torch.no_grad()
def test_equals_the_padded_reference(encoder, instruction, length):
    for prompts in (PROMPTS, PROMPTS[:1], PROMPTS[2:3], PROMPTS[-1:]):
        ours = encoder.encode(prompts, max_sequence_length=length, complex_human_instruction=instruction)
        assert_equals_reference(ours, padded_reference(encoder, prompts, length, instruction))


TINY = tiny_text_encoder()  # one for all examples


@given(
    prompts=st.lists(st.text(alphabet=" abcdeghinort.:猫é\n", max_size=30), min_size=1, max_size=4),
    length=st.integers(2, 24),
    instruction=st.sampled_from([None, (), ("",), ("user:",), INSTRUCTION, ("a ",), ("  ",)]),
)
@settings(max_examples=25, deadline=None)
@torch.no_grad()
def test_equals_the_padded_reference_for_any_text(prompts, length, instruction):
    encoder = PromptEncoder(tiny_tokenizer(), TINY)
    ours = encoder.encode(prompts, max_sequence_length=length, complex_human_instruction=instruction)
    assert_equals_reference(ours, padded_reference(encoder, prompts, length, instruction))


@pytest.mark.parametrize("instruction", [None, list(INSTRUCTION)])
@pytest.mark.parametrize("length", [9, 300])
@torch.no_grad()
def test_equals_the_diffusers_pipeline(encoder, instruction, length):
    from diffusers import SanaSprintPipeline

    pipeline = SanaSprintPipeline(
        encoder.tokenizer, encoder.text_encoder, vae=None, transformer=None, scheduler=None
    )
    embeds, mask = pipeline.encode_prompt(
        PROMPTS, device=torch.device("cpu"), max_sequence_length=length, complex_human_instruction=instruction
    )
    ours = encoder.encode(PROMPTS, max_sequence_length=length, complex_human_instruction=instruction)
    assert_equals_reference(ours, (embeds, mask.bool()))


# How the joined text is merged -> how many of the instruction's tokens stay usable.
SEAMS = {
    "blank and first letter": ([("▁", "c")], "x: ", 3),
    "colon, blank and first letter": ([(":", "▁"), (":▁", "c")], "x: ", 2),
    "the whole instruction": ([("▁", "c"), (":", "▁c"), ("x", ":▁c")], "x: ", 1),
    "no blank": ([(":", "c")], "x:", 2),
}


@pytest.mark.parametrize(("merges", "instruction", "shared"), SEAMS.values(), ids=SEAMS)
@torch.no_grad()
def test_tokens_that_merge_across_the_seam(merges, instruction, shared):
    encoder = PromptEncoder(merging_tokenizer(merges), tiny_text_encoder())
    runs = record_runs(encoder.text_encoder)
    for prompts in (["cat"], ["c"], ["dog"], [""], ["cat", "dog", ""]):
        runs.clear()
        ours = encoder.encode(prompts, max_sequence_length=6, complex_human_instruction=[instruction])
        # The second row of a batch has no such merge: all rows share what the worst one does.
        if prompts[0] == "cat":
            longest = max(len(encoder.tokenizer.encode(instruction + prompt)) for prompt in prompts)
            assert runs[-1] == (len(prompts), longest - shared)
        assert_equals_reference(ours, padded_reference(encoder, prompts, 6, [instruction]))


def _cut_left(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.truncation_side = "left"


def _append_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )


@pytest.mark.parametrize("change", [_cut_left, _append_eos])
@torch.no_grad()
def test_tokenizers_unlike_gemmas(encoder, change):
    change(encoder.tokenizer)
    for prompts in (PROMPTS, PROMPTS[-1:]):
        ours = encoder.encode(prompts, max_sequence_length=9, complex_human_instruction=INSTRUCTION)
        assert_equals_reference(ours, padded_reference(encoder, prompts, 9, INSTRUCTION))


@torch.no_grad()
def test_sliding_window_shorter_than_the_instruction():
    encoder = PromptEncoder(tiny_tokenizer(), tiny_text_encoder(sliding_window=5))
    ours = encoder.encode(PROMPTS, max_sequence_length=40, complex_human_instruction=INSTRUCTION)
    assert_equals_reference(ours, padded_reference(encoder, PROMPTS, 40, INSTRUCTION))


@torch.no_grad()
def test_bf16_is_as_near_to_the_truth_as_the_padded_reference(encoder):
    truth, mask = padded_reference(
        PromptEncoder(encoder.tokenizer, tiny_text_encoder().double()), PROMPTS, 40, INSTRUCTION
    )
    encoder.text_encoder.to(torch.bfloat16)
    ours = encoder.encode(PROMPTS, max_sequence_length=40, complex_human_instruction=INSTRUCTION)
    padded, _ = padded_reference(encoder, PROMPTS, 40, INSTRUCTION)
    assert ours.embeds.dtype == torch.bfloat16

    def error(values):
        return ((values.double() - truth[mask]).norm() / truth[mask].norm()).item()

    # Both round every operation to 8 bits, in other places, so either may be the nearer one; a wrong token,
    # position or key would be an error of order 1.
    assert error(padded[mask]) < 0.05
    assert error(ours.embeds[ours.mask]) < 1.3 * error(padded[mask])


# ----- what is run, kept and forgotten ----------------------------------------------------------------------


@torch.no_grad()
def test_runs_the_instruction_once_and_no_padding(encoder, runs):
    num_instruction = len(encoder.tokenizer.encode("\n".join(INSTRUCTION)))
    encoder.encode(["a cat"], complex_human_instruction=INSTRUCTION)
    encoder.encode(["the moon", "a cat", "a red cat in the moon"], complex_human_instruction=INSTRUCTION)
    encoder.encode(["a cat"])
    # bos and 'a cat' are 3 tokens; the instruction's last token, a blank, is not in the prefix: it merges
    # with 'a'.
    assert runs == [(1, num_instruction - 1), (1, 2), (3, 6), (1, 3)]


@torch.no_grad()
def test_the_kept_prefix_is_not_changed_by_use(encoder):
    first = encoder.encode(PROMPTS, complex_human_instruction=INSTRUCTION)
    (prefix,) = encoder._prefixes.values()
    before = [tensor.clone() for tensor in (*prefix.keys, *prefix.values, prefix.bos)]
    assert prefix.bos.untyped_storage().nbytes() == prefix.bos.nbytes  # not a view of all the hidden states
    encoder.encode(["a cat"], complex_human_instruction=INSTRUCTION)
    one = encoder.encode([""], max_sequence_length=2, complex_human_instruction=INSTRUCTION)
    one.embeds.add_(1)  # a caller may write to what it gets
    again = encoder.encode(PROMPTS, complex_human_instruction=INSTRUCTION)
    assert torch.equal(first.embeds, again.embeds)
    for old, new in zip(before, (*prefix.keys, *prefix.values, prefix.bos), strict=True):
        assert torch.equal(old, new)


@torch.no_grad()
def test_a_batch_shares_the_prefix_without_copies(encoder):
    from sana_sprint.models.text_encoder import _start_cache

    encoder.encode(["a"], complex_human_instruction=INSTRUCTION)
    (prefix,) = encoder._prefixes.values()
    cache = _start_cache(prefix, 5, batch_size=3)
    assert cache.get_seq_length() == 5
    for layer, keys, values in zip(cache.layers, prefix.keys, prefix.values, strict=True):
        assert layer.keys.data_ptr() == keys.data_ptr()
        assert layer.values.data_ptr() == values.data_ptr()
        assert layer.keys.shape[0] == layer.values.shape[0] == 3


@torch.no_grad()
def test_few_instructions_are_kept_the_least_used_goes_first(encoder, runs):
    encoder.encode(["a"], complex_human_instruction=["the first: "])
    for i in range(MAX_PREFIXES - 1):
        encoder.encode(["a"], complex_human_instruction=[f"number {i}: "])
    encoder.encode(
        ["a"], complex_human_instruction=["the first: "]
    )  # all kept so far, and this is now the newest
    assert len(encoder._prefixes) == MAX_PREFIXES
    encoder.encode(["a"], complex_human_instruction=["one more: "])
    assert len(encoder._prefixes) == MAX_PREFIXES
    runs.clear()
    encoder.encode(["a"], complex_human_instruction=["the first: "])
    encoder.encode(["a"], complex_human_instruction=["number 0: "])
    assert len(runs) == 3  # the first was kept, number 0 had to be run again


def _step(make_optimizer: Callable[..., torch.optim.Optimizer]) -> Callable[[Gemma2Model], None]:
    def change(model: Gemma2Model) -> None:
        optimizer = make_optimizer(model.parameters())
        with torch.enable_grad():
            model(input_ids=torch.tensor([[2, 5, 9]])).last_hidden_state.square().sum().backward()
        optimizer.step()

    return change


def _replace_data(model: Gemma2Model) -> None:
    weight = model.layers[0].self_attn.k_proj.weight
    weight.data = weight.data * 2


def _replace_parameter(model: Gemma2Model) -> None:
    projection = model.layers[0].self_attn.k_proj
    projection.weight = torch.nn.Parameter(projection.weight * 2)


def _doubled(model: Gemma2Model) -> dict[str, Tensor]:
    return {name: 2 * value for name, value in model.state_dict().items()}


CHANGES = {
    "SGD": _step(lambda parameters: torch.optim.SGD(parameters, lr=0.1)),
    "AdamW foreach": _step(lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=True)),
    "load_state_dict": lambda model: model.load_state_dict(_doubled(model)),
    "load_state_dict assign": lambda model: model.load_state_dict(_doubled(model), assign=True),
    "in place": lambda model: model.norm.weight.add_(1),
    "data": _replace_data,
    "parameter": _replace_parameter,
    "dtype": lambda model: model.to(torch.bfloat16),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_changed_weights_are_noticed(encoder, change):
    before = encoder.encode(["a cat"], complex_human_instruction=INSTRUCTION).embeds
    change(encoder.text_encoder)
    after = encoder.encode(["a cat"], complex_human_instruction=INSTRUCTION).embeds
    fresh = PromptEncoder(encoder.tokenizer, encoder.text_encoder)
    assert torch.equal(after, fresh.encode(["a cat"], complex_human_instruction=INSTRUCTION).embeds)
    assert not torch.equal(after.float(), before)


@pytest.mark.parametrize("instruction", [None, INSTRUCTION])
def test_training_drops_what_was_kept(encoder, instruction):
    """Fused optimizers write to the weights without torch's version counters noticing."""
    optimizer = torch.optim.AdamW(encoder.text_encoder.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        with torch.no_grad():
            kept = encoder.encode(["a cat"], complex_human_instruction=INSTRUCTION).embeds
            fresh = PromptEncoder(encoder.tokenizer, encoder.text_encoder)
            assert torch.equal(kept, fresh.encode(["a cat"], complex_human_instruction=INSTRUCTION).embeds)
        encoder.encode(["a cat"], complex_human_instruction=instruction).embeds.square().sum().backward()
        optimizer.step()


@torch.no_grad()
def test_clear_cache_forgets_what_parameters_do_not_show(encoder):
    encoder.encode(["a cat"], complex_human_instruction=INSTRUCTION)
    for layer in encoder.text_encoder.layers:
        layer.self_attn.scaling *= 0.5
    fresh = PromptEncoder(encoder.tokenizer, encoder.text_encoder)
    expected = fresh.encode(["a cat"], complex_human_instruction=INSTRUCTION).embeds
    assert not torch.equal(encoder.encode(["a cat"], complex_human_instruction=INSTRUCTION).embeds, expected)
    encoder.clear_cache()
    assert torch.equal(encoder.encode(["a cat"], complex_human_instruction=INSTRUCTION).embeds, expected)


def test_inference_mode_no_grad_and_grad_mix(encoder):
    def encode():
        return encoder.encode(["a cat", "a"], complex_human_instruction=INSTRUCTION).embeds

    with torch.inference_mode():
        first = encode()
    with torch.no_grad():
        second = encode()
    third = encode()
    third.sum().backward()
    assert torch.equal(first, second)
    assert torch.equal(second, third)


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        encoder = PromptEncoder(tiny_tokenizer(), tiny_text_encoder())
        first = encoder.encode(["a cat"], complex_human_instruction=INSTRUCTION)
        assert_equals_reference(first, padded_reference(encoder, ["a cat"], 300, INSTRUCTION))


@torch.no_grad()
def test_autocast_has_its_own_prefix(encoder):
    plain = encoder.encode(["a cat"], complex_human_instruction=INSTRUCTION).embeds
    with torch.autocast("cpu", torch.bfloat16):
        mixed = encoder.encode(["a cat"], complex_human_instruction=INSTRUCTION).embeds
        fresh = PromptEncoder(encoder.tokenizer, encoder.text_encoder)
        assert torch.equal(mixed, fresh.encode(["a cat"], complex_human_instruction=INSTRUCTION).embeds)
    assert not torch.equal(mixed, plain)
    assert torch.equal(plain, encoder.encode(["a cat"], complex_human_instruction=INSTRUCTION).embeds)


# ----- training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("instruction", [None, INSTRUCTION])
def test_gradients_equal_those_of_the_padded_reference(instruction, checkpointing):
    model = tiny_text_encoder().train()
    if checkpointing:
        for module in model.modules():  # the method that does this changed its name within transformers 5
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = True
                module._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
    encoder = PromptEncoder(tiny_tokenizer(), model)
    with torch.no_grad():  # leaves a kept prefix behind that training must not use
        encoder.text_encoder.eval()
        encoder.encode(["a"], complex_human_instruction=instruction)
        encoder.text_encoder.train()

    def gradients(embeds, mask):
        model.zero_grad()
        target = torch.linspace(-1, 1, embeds[mask].numel(), dtype=embeds.dtype).view_as(embeds[mask])
        (embeds[mask] - target).square().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    ours = encoder.encode(PROMPTS, max_sequence_length=40, complex_human_instruction=instruction)
    reference = padded_reference(encoder, PROMPTS, 40, instruction)
    assert_equals_reference(ours, reference)
    expected = gradients(*reference)
    actual = gradients(ours.embeds, ours.mask)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        # fp32 sums over up to 300 tokens in another order; a gradient that lacks the prefix's part is off by
        # order 1.
        torch.testing.assert_close(actual[name], gradient, atol=1e-4 * gradient.abs().max().item(), rtol=0)


def test_training_runs_the_instruction_once_for_the_batch(encoder, runs):
    encoder.text_encoder.train()
    num_instruction = len(encoder.tokenizer.encode("\n".join(INSTRUCTION)))
    for _ in range(2):
        encoder.encode(["a cat", "the moon"], complex_human_instruction=INSTRUCTION)
    assert runs == 2 * [(1, num_instruction - 1), (2, 2)]
    assert not encoder._prefixes


# ----- reports and refusals ---------------------------------------------------------------------------------


@torch.no_grad()
def test_truncation_is_reported_with_the_number_of_lost_tokens(encoder):
    words = "a cat in the moon and a photo"
    num_words = (
        8  # each a token of its own; with bos 9, and the instruction's last blank merges with the first
    )
    for instruction in (None, INSTRUCTION):
        exact = encoder.encode(
            [words], max_sequence_length=num_words + 1, complex_human_instruction=instruction
        )
        short = encoder.encode(
            [words, "a"], max_sequence_length=num_words - 2, complex_human_instruction=instruction
        )
        assert (exact.truncated, exact.lost_tokens, exact.num_tokens) == ((False,), (0,), (9,))
        assert (short.truncated, short.lost_tokens, short.num_tokens) == ((True, False), (3, 0), (6, 2))


@torch.no_grad()
def test_captions_are_cleaned_on_request(encoder):
    cleaned = encoder.encode(["<b>A Cat</b> https://a.com/x"], clean_caption=True)
    assert torch.equal(cleaned.embeds, encoder.encode(["a cat"]).embeds)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "a cat"}, "sequence of strings: 'a cat'"),
        ({"prompts": []}, r"non-empty sequence of strings: \[\]"),
        ({"prompts": ["a"], "max_sequence_length": 1}, "at least 2 .*: 1"),
        ({"prompts": ["a"], "complex_human_instruction": "Describe"}, "sequence of lines.*'Describe'"),
    ],
)
def test_bad_arguments(encoder, arguments, message):
    with pytest.raises(ValueError, match=message):
        encoder.encode(**arguments)


def test_a_tokenizer_without_bos_cannot_encode_nothing():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(ValueError, match="gave no tokens"):
        PromptEncoder(tokenizer, tiny_text_encoder()).encode(["a", ""])


def test_fp16_is_refused(encoder):
    with (
        pytest.raises(ValueError, match=r"float16.*bfloat16 or torch\.float32"),
        torch.autocast("cpu", torch.float16),
    ):
        encoder.encode(["a"])
    encoder.text_encoder.half()
    with pytest.raises(ValueError, match=r"float16.*bfloat16 or torch\.float32"):
        encoder.encode(["a"])


def test_importing_the_module_does_not_import_transformers():
    code = "import sys, sana_sprint.models.text_encoder; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ----- folders ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_text(tmp_path)
    return tmp_path


@torch.no_grad()
def test_load_gives_back_what_was_saved(folder, encoder):
    loaded = PromptEncoder(load_tokenizer(folder / "tokenizer"), load_text_encoder(folder / "text_encoder"))
    assert not loaded.text_encoder.training
    assert loaded.text_encoder.config._attn_implementation == "eager"
    expected = encoder.encode(PROMPTS, complex_human_instruction=INSTRUCTION)
    assert torch.equal(loaded.encode(PROMPTS, complex_human_instruction=INSTRUCTION).embeds, expected.embeds)


def test_load_keeps_or_changes_the_dtype(folder):
    assert load_text_encoder(folder / "text_encoder").dtype == torch.float32
    assert load_text_encoder(folder / "text_encoder", dtype=torch.bfloat16).dtype == torch.bfloat16
    load_text_encoder(folder / "text_encoder").bfloat16().save_pretrained(folder / "small")
    assert load_text_encoder(folder / "small").dtype == torch.bfloat16


def test_load_reads_shards_and_variants(tmp_path):
    model = tiny_text_encoder()
    model.save_pretrained(tmp_path, variant="bf16", max_shard_size="40KB")
    assert len(list(tmp_path.glob("model.bf16-*.safetensors"))) > 1
    loaded = load_text_encoder(tmp_path, variant="bf16")
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    with pytest.raises(ValueError, match="cannot load the text encoder"):
        load_text_encoder(tmp_path)


@pytest.mark.parametrize("tied", [True, False])  # the head of its own is in the folder only if it is not tied
def test_load_takes_the_body_of_a_causal_model(tmp_path, tied):
    model = Gemma2ForCausalLM(tiny_text_encoder(tie_word_embeddings=tied).config)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Gemma2ForCausalLM"]
    loaded = load_text_encoder(tmp_path)
    assert type(loaded) is Gemma2Model
    for name, value in model.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_load_refuses_other_models_and_incomplete_folders(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        load_text_encoder(tmp_path / "nothing")
    LlamaModel(
        LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        )
    ).save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="Gemma2Model, Gemma2ForCausalLM: LlamaModel"):
        load_text_encoder(tmp_path / "llama")
    tiny_text_encoder(num_hidden_layers=2).save_pretrained(tmp_path / "short")
    config = Gemma2Config.from_pretrained(tmp_path / "short")
    config.num_hidden_layers, config.layer_types = 3, [*config.layer_types, "full_attention"]
    config.save_pretrained(tmp_path / "short")
    with pytest.raises(ValueError, match=r"missing \['layers\.2"):
        load_text_encoder(tmp_path / "short")
    config.hidden_size = 16
    config.save_pretrained(tmp_path / "short")
    with pytest.raises(ValueError, match="cannot load the text encoder"):
        load_text_encoder(tmp_path / "short")


def test_load_reads_no_pickles(folder):
    weights = folder / "text_encoder" / "model.safetensors"
    weights.unlink()
    torch.save(tiny_text_encoder().state_dict(), weights.with_name("pytorch_model.bin"))
    with pytest.raises(ValueError, match="cannot load the text encoder"):
        load_text_encoder(folder / "text_encoder")


def test_load_refuses_fp16(folder):
    with pytest.raises(ValueError, match="float16"):
        load_text_encoder(folder / "text_encoder", dtype=torch.float16)
    tiny_text_encoder().half().save_pretrained(folder / "half")
    with pytest.raises(ValueError, match="float16"):
        load_text_encoder(folder / "half")
    assert load_text_encoder(folder / "half", dtype=torch.float32).dtype == torch.float32


def test_load_tokenizer_refuses_what_is_none(tmp_path):
    with pytest.raises(ValueError, match="no such tokenizer folder"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(ValueError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path)
