"""Codes and scales of a weight."""

import pytest
import torch

from sana_sprint.quantize import PRESETS
from sana_sprint.quantize.formats import decode, encode
from tests.helpers.quantize import WEIGHT_ERROR, relative


@pytest.mark.parametrize("preset", PRESETS)
def test_codes_stand_for_the_weight(preset):
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(0))
    weight[3] = 0.0
    codes, scale = encode(weight, preset)
    assert relative(decode(codes, scale, preset), weight) < WEIGHT_ERROR[preset]
    assert torch.equal(decode(codes, scale, preset)[3], torch.zeros(256))
    assert torch.equal(scale, scale.bfloat16().float()), "a cast to bf16 and back must not change the scale"


@pytest.mark.parametrize("preset", PRESETS)
def test_quantising_twice_errs_no_more_than_twice(preset):
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    once = decode(*encode(weight, preset), preset)
    # A row's largest code need not be used after the scale was rounded up: then the second grid is a finer one.
    assert relative(decode(*encode(once, preset), preset), once) < WEIGHT_ERROR[preset]
