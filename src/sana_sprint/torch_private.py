"""Operations that torch does not document, each with what takes its place where it is absent.

They exist only in these functions. An operation is used if this torch has it under its name and with the arguments listed
here; otherwise documented ones give the same numbers more slowly, and a warning is logged once. Tested with torch 2.13.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Name -> arguments, in order. Calls below are positional, so a torch that adds or moves one counts as without.
ARGUMENTS = {
    "onednn::qlinear_prepack": ("weight", "x_shape"),
    "onednn::qlinear_pointwise": (
        "qx", "x_scale", "x_zero_point", "qw", "w_scale", "w_zero_point", "bias",
        "output_scale", "output_zero_point", "output_dtype", "post_op_name", "post_op_args", "post_op_algorithm",
    ),
    "onednn::qconv_prepack": (
        "weight", "w_scales", "x_scale", "x_zp", "stride", "padding", "dilation", "groups", "x_shape",
    ),
    "onednn::qconv2d_pointwise": (
        "qx", "x_scale", "x_zero_point", "qw", "w_scale", "w_zero_point", "bias",
        "stride", "padding", "dilation", "groups",
        "output_scale", "output_zero_point", "output_dtype", "attr", "scalars", "algorithm",
    ),
    "aten::_int_mm": ("self", "mat2"),
    "aten::_scaled_mm": (
        "self", "mat2", "scale_a", "scale_b", "bias", "scale_result", "out_dtype", "use_fast_accum",
    ),
    "mkldnn::_is_mkldnn_bf16_supported": (),
}  # fmt: skip

# The code of 0: the CPU's 8-bit units take unsigned activations only, others run in a slow reference.
ZERO = 128
_NO_PADDING = [
    0,
    0,
]  # the convolution's own takes up to twice the time (2x2 kernels, oneDNN 3.12): zeros are put around before
_NO_DILATION = [1, 1]

_log = logging.getLogger(__name__)


@cache
def operation(name: str) -> Callable[..., Any] | None:
    """The operation of a name in `ARGUMENTS`; None, with a warning, if this torch lacks it or has it with other arguments."""
    space, _, leaf = name.partition("::")
    try:
        found: Any = getattr(getattr(torch.ops, space), leaf).default
        arguments = tuple(argument.name for argument in found._schema.arguments)
    except (AttributeError, RuntimeError):
        found, arguments = None, None
    if arguments == ARGUMENTS[name]:
        wanted: Callable[..., Any] = found
        return wanted
    how = "lacks" if found is None else "has other arguments for"
    _log.warning("torch %s %s %s: a slower way gives the same numbers", torch.__version__, how, name)
    return None


def _both(prepare: str, compute: str) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    first, second = operation(f"onednn::{prepare}"), operation(f"onednn::{compute}")
    return None if first is None or second is None else (first, second)


# ----- what a processor has -------------------------------------------------------------------------------------------


def has_vnni() -> bool:
    """Whether this CPU has products of 8-bit codes (AVX-512 VNNI), and torch the library that uses them."""
    if not _has_onednn():
        return False
    if hasattr(torch.cpu, "get_capabilities"):  # documented, but younger
        return bool(torch.cpu.get_capabilities().get("avx512_vnni", False))
    return bool(torch.cpu._is_vnni_supported())


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]  # torch's


def has_bf16_products() -> bool:
    """Whether matrix products and convolutions in bf16 run in bf16 on this CPU."""
    supported = operation("mkldnn::_is_mkldnn_bf16_supported")
    if supported is not None:
        return bool(supported())
    return _has_onednn() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


# ----- products of 8-bit codes ----------------------------------------------------------------------------------------


def pack_linear(codes: Tensor) -> Tensor:
    """Weight codes (outputs, inputs) int8 as `linear` takes them: in the order in which the CPU's kernel reads them."""
    kernels = _both("qlinear_prepack", "qlinear_pointwise")
    packed: Tensor = codes if kernels is None else kernels[0](codes, None)
    return packed


def linear(rounded: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """`(rounded - ZERO) @ codes.T * scale` in the scale's dtype: rounded (M, inputs) uint8, scale (outputs,)."""
    kernels = _both("qlinear_prepack", "qlinear_pointwise")
    if kernels is None:  # sums of whole numbers below 2^53 are exact in fp64
        sums = (rounded.double() - ZERO) @ packed.double().t()
        return (sums.float() * scale.float()).to(scale.dtype)
    out: Tensor = kernels[1](
        rounded, 1.0, ZERO, packed, scale.float(), _zeros(scale), None, 1.0, 0, scale.dtype, "none", [], ""
    )
    return out


def pack_convolution(codes: Tensor, scale: Tensor, stride: list[int]) -> Tensor:
    """Weight codes (outputs, inputs, kernel, kernel) int8 as `convolution` takes them."""
    kernels = _both("qconv_prepack", "qconv2d_pointwise")
    if kernels is None:
        return codes
    packed: Tensor = kernels[0](codes, scale.float(), 1.0, ZERO, stride, _NO_PADDING, _NO_DILATION, 1, None)
    return packed


def convolution(
    rounded: Tensor, step: float, packed: Tensor, scale: Tensor, bias: Tensor | None, stride: list[int]
) -> Tensor:
    """`conv2d(rounded - ZERO, codes) * step * scale + bias` in the scale's dtype, without padding; channels_last.

    Args:
        rounded: (1, inputs, H, W) uint8, channels_last.
        step: what a difference of 1 between codes stands for.
        packed: from `pack_convolution` with the same scale and stride.
        scale: (outputs,).
        bias: (outputs,) fp32.
        stride: vertical and horizontal.
    """
    kernels = _both("qconv_prepack", "qconv2d_pointwise")
    if kernels is None:
        sums = F.conv2d(rounded.double() - ZERO, packed.double(), stride=stride).float()
        out = sums * step * scale.float()[:, None, None]
        out = out if bias is None else out + bias[:, None, None]
        return out.to(scale.dtype).contiguous(memory_format=torch.channels_last)
    result: Tensor = kernels[1](
        rounded, step, ZERO, packed, scale.float(), _zeros(scale), bias,
        stride, _NO_PADDING, _NO_DILATION, 1, 1.0, 0, scale.dtype, "none", [], "",
    )  # fmt: skip
    return result


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of int8, exact, in int32. Torch's own takes at least 17 rows on a GPU."""
    multiply = operation("aten::_int_mm")
    product: Tensor = (a.double() @ b.double()).to(torch.int32) if multiply is None else multiply(a, b)
    return product


def fp8_product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    """`(a @ b) * a_scale * b_scale` of float8_e4m3 in bf16, the only result that torch has for scales (M,1) and (1,N).

    Raises:
        RuntimeError: this torch has neither its older nor its documented function (since 2.10) for it.
    """
    multiply = operation("aten::_scaled_mm")
    product: Tensor
    if multiply is not None:
        product = multiply(a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=torch.bfloat16)
    elif hasattr(F, "scaled_mm"):
        by_row = F.ScalingType.RowWise
        product = F.scaled_mm(a, b, a_scale, by_row, b_scale, by_row, output_dtype=torch.bfloat16)
    else:
        raise RuntimeError(f"torch {torch.__version__} has no products of fp8 with a scale per row")
    return product


def _zeros(scale: Tensor) -> Tensor:
    return torch.zeros(len(scale), dtype=torch.int64)


# ----- many tensors at once -------------------------------------------------------------------------------------------


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies each source into its target: in one launch on a GPU, where torch can."""
    copy = getattr(torch, "_foreach_copy_", None)
    if copy is not None:
        copy(list(targets), list(sources))
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def lerp_all(targets: Sequence[Tensor], ends: Sequence[Tensor], weight: float) -> None:
    """Moves each target towards its end by a fraction `weight`: in one launch on a GPU, where torch can."""
    lerp = getattr(torch, "_foreach_lerp_", None)
    if lerp is not None:
        lerp(list(targets), list(ends), weight)
        return
    for target, end in zip(targets, ends, strict=True):
        target.lerp_(end, weight)
