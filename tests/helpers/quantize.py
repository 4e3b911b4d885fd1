"""Presets, pictures and errors for the tests of quantisation."""

import pytest
import torch

from sana_sprint.pipelines.text_to_image import SanaSprintPipeline
from sana_sprint.torch_private import has_vnni

needs_vnni = pytest.mark.skipif(not has_vnni(), reason="int8 on a CPU needs VNNI instructions")
ON_CPU = ["int8-weights", "nf4", "int4-weights", pytest.param("int8", marks=needs_vnni)]
# Relative error (root mean square) of a weight of normal numbers: a step of the largest of 256 (or 64) over 127 (or 7)
# parts, uniformly rounded; nf4's is measured on the published levels; fp8 has 3 bits of fraction.
WEIGHT_ERROR = {"int8": 0.01, "int8-weights": 0.01, "fp8": 0.03, "nf4": 0.10, "int4-weights": 0.12}
COMPONENTS = ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")


def relative(found, expected):
    return float((found.float() - expected.float()).norm().detach() / expected.float().norm().detach())


def emoji(**arguments):
    pipe = SanaSprintPipeline.from_pretrained("emoji", torch_dtype=torch.bfloat16, **arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe, prompt="a red apple", **arguments):
    return pipe(prompt, **{"seed": 3, "num_inference_steps": 1, "output_type": "pt", **arguments}).images
