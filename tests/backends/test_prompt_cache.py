"""The cached encoder runs only new tokens, uses no stale keys and values, and lets gradients through."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import Gemma2Model

from sana_sprint.backends import prompt_cache
from sana_sprint.backends.prompt_cache import MAX_INSTRUCTIONS, CachedPromptEncoder
from tests.helpers.text import (
    INSTRUCTION,
    PROMPTS,
    assert_equals_reference,
    padded_reference,
    record_runs,
    tiny_encoder,
    tiny_text_encoder,
    tiny_tokenizer,
)


@pytest.fixture
def encoder() -> CachedPromptEncoder:
    return tiny_encoder()


@pytest.fixture
def runs(encoder: CachedPromptEncoder) -> list[tuple[int, ...]]:
    """The shapes of the token batches that the model is run on."""
    return record_runs(encoder.text_encoder)


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
def test_what_is_kept_is_not_changed_by_use(encoder):
    first = encoder.encode(PROMPTS, complex_human_instruction=INSTRUCTION)
    encoder.encode(["a cat"], complex_human_instruction=INSTRUCTION)
    one = encoder.encode([""], max_sequence_length=2, complex_human_instruction=INSTRUCTION)
    one.embeds.add_(1)  # a caller may write to what it gets
    again = encoder.encode(PROMPTS, complex_human_instruction=INSTRUCTION)
    assert torch.equal(first.embeds, again.embeds)
    fresh = CachedPromptEncoder(encoder.tokenizer, encoder.text_encoder)
    assert torch.equal(again.embeds, fresh.encode(PROMPTS, complex_human_instruction=INSTRUCTION).embeds)


@torch.no_grad()
def test_a_prefix_keeps_no_more_than_it_needs_and_a_batch_shares_it(encoder):
    prefix = prompt_cache.run_prefix(encoder.text_encoder, (2, 5, 9, 11, 4, 8))
    assert prefix.bos.untyped_storage().nbytes() == prefix.bos.nbytes  # not a view of all the hidden states
    cache = prompt_cache.start_cache(prefix, 5, batch_size=3)
    assert cache.get_seq_length() == 5
    for layer, keys, values in zip(cache.layers, prefix.keys, prefix.values, strict=True):
        assert layer.keys.data_ptr() == keys.data_ptr()
        assert layer.values.data_ptr() == values.data_ptr()
        assert layer.keys.shape[0] == layer.values.shape[0] == 3


@torch.no_grad()
def test_few_instructions_are_kept_the_least_used_goes_first(encoder, runs):
    encoder.encode(["a"], complex_human_instruction=["the first: "])
    for i in range(MAX_INSTRUCTIONS - 1):
        encoder.encode(["a"], complex_human_instruction=[f"number {i}: "])
    encoder.encode(
        ["a"], complex_human_instruction=["the first: "]
    )  # all kept so far, and this is now the newest
    assert len(encoder) == MAX_INSTRUCTIONS
    encoder.encode(["a"], complex_human_instruction=["one more: "])
    assert len(encoder) == MAX_INSTRUCTIONS
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
    fresh = CachedPromptEncoder(encoder.tokenizer, encoder.text_encoder)
    assert torch.equal(after, fresh.encode(["a cat"], complex_human_instruction=INSTRUCTION).embeds)
    assert not torch.equal(after.float(), before)


@pytest.mark.parametrize("instruction", [None, INSTRUCTION])
def test_training_drops_what_was_kept(encoder, instruction):
    """Fused optimizers write to the weights without torch's version counters noticing."""
    optimizer = torch.optim.AdamW(encoder.text_encoder.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        with torch.no_grad():
            kept = encoder.encode(["a cat"], complex_human_instruction=INSTRUCTION).embeds
            fresh = CachedPromptEncoder(encoder.tokenizer, encoder.text_encoder)
            assert torch.equal(kept, fresh.encode(["a cat"], complex_human_instruction=INSTRUCTION).embeds)
        encoder.encode(["a cat"], complex_human_instruction=instruction).embeds.square().sum().backward()
        optimizer.step()


@torch.no_grad()
def test_clear_cache_forgets_what_parameters_do_not_show(encoder):
    encoder.encode(["a cat"], complex_human_instruction=INSTRUCTION)
    for layer in encoder.text_encoder.layers:
        layer.self_attn.scaling *= 0.5
    fresh = CachedPromptEncoder(encoder.tokenizer, encoder.text_encoder)
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
        encoder = CachedPromptEncoder(tiny_tokenizer(), tiny_text_encoder())
        first = encoder.encode(["a cat"], complex_human_instruction=INSTRUCTION)
        assert_equals_reference(first, padded_reference(encoder, ["a cat"], 300, INSTRUCTION))


@torch.no_grad()
def test_autocast_has_its_own_prefix(encoder):
    plain = encoder.encode(["a cat"], complex_human_instruction=INSTRUCTION).embeds
    with torch.autocast("cpu", torch.bfloat16):
        mixed = encoder.encode(["a cat"], complex_human_instruction=INSTRUCTION).embeds
        fresh = CachedPromptEncoder(encoder.tokenizer, encoder.text_encoder)
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
    encoder = CachedPromptEncoder(tiny_tokenizer(), model)
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
    assert len(encoder) == 0
