"""LoRAs and presets from the command line."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.helpers.cli import assert_refused, call, succeed
from tests.helpers.quantize import emoji, picture


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
