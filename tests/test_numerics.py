"""The dtype policy, finite checks, and seeds."""

import math

import pytest
import torch

from sana_sprint import numerics
from sana_sprint.numerics import (
    MAX_SEED,
    NonFiniteError,
    check_dtype,
    check_finite,
    component_dtypes,
    draw_noise,
    finite_checks_later,
    image_seeds,
    make_generators,
    parse_dtype,
)

COMPONENTS = ("text_encoder", "vae", "transformer")


@pytest.mark.parametrize("component", ["text_encoder", "vae"])
def test_fp16_is_refused_where_it_overflows(component):
    with pytest.raises(ValueError, match=rf"{component} cannot run in float16: .* use float32 or bfloat16"):
        check_dtype(component, torch.float16)
    with pytest.raises(ValueError, match=f"{component} cannot run in float16"):
        component_dtypes({component: "float16"}, COMPONENTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, None])
def test_the_transformer_runs_in_all_three(dtype):
    check_dtype("transformer", dtype)
    assert component_dtypes({"transformer": dtype}, COMPONENTS)["transformer"] == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match="float32, bfloat16, float16"):
        parse_dtype(dtype)


def test_dtypes_for_all_or_each_component():
    bf16 = torch.bfloat16
    assert component_dtypes(None, COMPONENTS) == dict.fromkeys(COMPONENTS)
    assert component_dtypes("auto", COMPONENTS) == dict.fromkeys(COMPONENTS)
    assert component_dtypes("bfloat16", COMPONENTS) == dict.fromkeys(COMPONENTS, bf16)
    assert component_dtypes({"vae": torch.float32, "default": "torch.bfloat16"}, COMPONENTS) == {
        "text_encoder": bf16,
        "vae": torch.float32,
        "transformer": bf16,
    }
    assert component_dtypes({"vae": torch.float32}, COMPONENTS)["transformer"] is None
    with pytest.raises(ValueError, match="unknown components: unet"):
        component_dtypes({"unet": bf16}, COMPONENTS)
    with pytest.raises(ValueError, match="got: 'half'"):
        component_dtypes("half", COMPONENTS)


def test_finite_tensors_pass_through_and_others_name_the_stage():
    tensor = torch.ones(2, 3)
    assert check_finite(tensor, "step 1 of 2") is tensor
    for bad in (math.nan, math.inf, -math.inf):
        broken = tensor.to(torch.bfloat16)
        broken[1, 2] = bad
        with pytest.raises(NonFiniteError, match=r"step 1 of 2 gave 1 of 6 .* bfloat16"):
            check_finite(broken, "step 1 of 2")


def test_checks_of_a_device_come_last_and_in_order(monkeypatch):
    monkeypatch.setattr(numerics, "_computes_later", lambda tensor: True)
    done = []

    def run(*stages, later=True, error=None):
        with finite_checks_later(later):
            for stage, value in stages:
                tensor = torch.tensor([1.0, value])
                assert check_finite(tensor, stage) is tensor
                done.append(stage)
            if error:
                raise error

    with pytest.raises(NonFiniteError, match="first gave 1 of 2"):
        run(("good", 1.0), ("first", math.nan), ("second", math.inf))
    assert done == ["good", "first", "second"]
    with pytest.raises(NonFiniteError, match="at once"):
        run(("at once", math.nan), later=False)
    with pytest.raises(ZeroDivisionError):  # a call that fails otherwise says so
        run(("first", math.nan), error=ZeroDivisionError())
    run(("good", 1.0))


def test_seeds_count_up_from_one_number():
    assert image_seeds(7, 3) == [7, 8, 9]
    assert image_seeds([5, 1], 2) == [5, 1]
    assert image_seeds(MAX_SEED, 1) == [MAX_SEED]


def test_random_seeds_differ_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    first, second = image_seeds(None, 2), image_seeds(None, 2)
    assert first != second  # equal once in 2**32 runs
    assert first == image_seeds(first[0], 2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("seed", "count", "message"),
    [
        ([1, 2], 3, r"one per image, 3 here; got: \[1, 2\]"),
        (-1, 1, "from 0 to .* got: -1"),
        (MAX_SEED, 2, f"got: {MAX_SEED + 1}"),
        (1.5, 1, "whole number, got: 1.5"),
        ("12", 2, "whole number, got: '1'"),
    ],
)
def test_bad_seeds_are_named(seed, count, message):
    with pytest.raises(ValueError, match=message):
        image_seeds(seed, count)


def test_an_images_noise_does_not_depend_on_its_batch():
    both = draw_noise((2, 3, 4, 4), make_generators([7, 8]))
    assert torch.equal(both[1:], draw_noise((1, 3, 4, 4), make_generators([8])))
    assert both.dtype == torch.float32


def test_one_generator_draws_the_batch_at_once():
    expected = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(7))
    assert torch.equal(draw_noise((2, 3, 4, 4), torch.Generator().manual_seed(7)), expected)
    torch.manual_seed(7)
    assert torch.equal(draw_noise((2, 3, 4, 4), None), expected)


def test_generators_must_match_the_batch():
    with pytest.raises(ValueError, match="one generator per image, 3 here; got: 2"):
        draw_noise((3, 1, 1, 1), make_generators([1, 2]))
