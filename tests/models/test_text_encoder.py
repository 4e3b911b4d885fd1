"""Prompt encoders, plain and cached: equal to the published padded encoding; reports of what is cut; refusals."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from sana_sprint.backends.prompt_cache import CachedPromptEncoder
from sana_sprint.models.text_encoder import PromptEncoder
from sana_sprint.prompts import COMPLEX_HUMAN_INSTRUCTION
from tests.helpers.text import (
    FP32_ATOL,
    INSTRUCTION,
    PROMPTS,
    assert_equals_reference,
    merging_tokenizer,
    padded_reference,
    record_runs,
    tiny_text_encoder,
    tiny_tokenizer,
)


@pytest.fixture(params=[PromptEncoder, CachedPromptEncoder])
def encoder(request) -> PromptEncoder:
    return request.param(tiny_tokenizer(), tiny_text_encoder())


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
    for kind in (PromptEncoder, CachedPromptEncoder):
        encoder = kind(tiny_tokenizer(), TINY)
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
    # With padding it is the same at every position, the padding's included.
    full = encoder.encode(
        PROMPTS, max_sequence_length=length, complex_human_instruction=instruction, pad=True
    )
    assert torch.equal(full.mask, mask.bool())
    torch.testing.assert_close(full.embeds, embeds, atol=FP32_ATOL, rtol=0)


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
    encoder = CachedPromptEncoder(merging_tokenizer(merges), tiny_text_encoder())
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
def test_sliding_window_shorter_than_the_instruction(encoder):
    encoder.text_encoder = tiny_text_encoder(sliding_window=5)
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
