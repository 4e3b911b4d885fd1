"""The dtype policy and finite checks."""

import math

import pytest
import torch

from sana_sprint.precision import (
    NonFiniteError,
    check_dtype,
    check_finite,
    component_dtypes,
    finite_checks_later,
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


class OnCuda(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU, whose results nobody should wait for."""

    is_cuda = True


def test_checks_of_a_device_come_last_and_in_order():
    done = []

    def run(*stages, later=True, error=None):
        with finite_checks_later(later):
            for stage, value in stages:
                tensor = torch.tensor([1.0, value]).as_subclass(OnCuda)
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
