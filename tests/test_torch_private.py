"""Operations that torch does not document: where they are absent or changed, the numbers stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from sana_sprint import torch_private
from sana_sprint.quantize.layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear
from sana_sprint.quantize.matmul import fp8_rows, int8_rows

needs_vnni = pytest.mark.skipif(not torch_private.has_vnni(), reason="int8 on a CPU needs VNNI instructions")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def other_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A function that makes torch seem to have other arguments for the operations named."""

    def change(*names: str) -> None:
        for name in names:
            monkeypatch.setitem(torch_private.ARGUMENTS, name, (*torch_private.ARGUMENTS[name], "a_new_one"))
        torch_private.operation.cache_clear()

    yield change
    monkeypatch.undo()
    torch_private.operation.cache_clear()


@pytest.mark.parametrize("name", torch_private.ARGUMENTS)
def test_this_torch_has_every_operation_with_the_arguments_it_is_called_with(name: str) -> None:
    assert torch_private.operation(name) is not None


def test_an_absent_operation_is_none_and_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(torch_private.ARGUMENTS, "onednn::no_such_thing", ("x",))
    assert torch_private.operation("onednn::no_such_thing") is None
    assert torch_private.operation("onednn::no_such_thing") is None
    assert [record.getMessage() for record in caplog.records] == [
        f"torch {torch.__version__} lacks onednn::no_such_thing: a slower way gives the same numbers"
    ]
    torch_private.operation.cache_clear()


def int8_layers(dtype: torch.dtype) -> list[tuple[QuantizedLayer, Tensor]]:
    """int8 layers of each geometry that the models have, with an input."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    linear = nn.Linear(64, 40).to(dtype)
    layers: list[tuple[QuantizedLayer, Tensor]] = [
        (QuantizedLinear.of(linear, "int8"), 3 * torch.randn(2, 37, 64, generator=generator).to(dtype))
    ]
    for channels, kernel, stride, bias in ((64, 3, 1, True), (32, 2, 1, True), (48, 3, 2, False)):
        conv = nn.Conv2d(channels, 40, kernel, stride, padding=kernel // 2, bias=bias).to(dtype)
        x = torch.randn(2, channels, 21, 18, generator=generator).to(dtype)
        layers.append((QuantizedConv2d.of(conv, "int8"), x))
    return layers


@needs_vnni
@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "missing",
    [
        ("onednn::qlinear_prepack", "onednn::qconv_prepack"),
        ("onednn::qlinear_pointwise", "onednn::qconv2d_pointwise"),
    ],
)
def test_int8_layers_give_the_same_bits_without_the_kernels(
    dtype: torch.dtype, missing: tuple[str, ...], other_torch: Callable[..., None]
) -> None:
    expected = [layer(x) for layer, x in int8_layers(dtype)]
    other_torch(*missing)
    for (layer, x), out in zip(int8_layers(dtype), expected, strict=True):
        found = layer(x)
        assert found.dtype == out.dtype
        assert found.stride() == out.stride()
        assert torch.equal(found, out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_other_products_give_the_same_bits_by_documented_functions(
    dtype: torch.dtype, other_torch: Callable[..., None]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, 64, generator=generator).to(dtype)
    codes = torch.randint(-127, 128, (40, 64), dtype=torch.int8, generator=generator)
    bytes_of_fp8 = torch.randn(48, 64, generator=generator).to(torch.float8_e4m3fn).view(torch.uint8)
    scale = torch.rand(48, generator=generator).to(dtype)
    whole = int8_rows(x, codes, None, scale[:40])
    eighths = fp8_rows(x, bytes_of_fp8, scale)
    other_torch("aten::_int_mm", "aten::_scaled_mm")
    assert torch.equal(int8_rows(x, codes, None, scale[:40]), whole)
    assert torch.equal(fp8_rows(x, bytes_of_fp8, scale), eighths)


def test_a_torch_without_products_of_fp8_says_so(
    monkeypatch: pytest.MonkeyPatch, other_torch: Callable[..., None]
) -> None:
    other_torch("aten::_scaled_mm")
    monkeypatch.delattr(torch.nn.functional, "scaled_mm")
    with pytest.raises(RuntimeError, match="has no products of fp8 with a scale per row"):
        fp8_rows(torch.randn(4, 16), torch.zeros(16, 16, dtype=torch.uint8), torch.ones(16))


def test_what_a_processor_has_is_known_without_the_private_function(other_torch: Callable[..., None]) -> None:
    expected = torch_private.has_bf16_products()
    other_torch("mkldnn::_is_mkldnn_bf16_supported")
    assert torch_private.has_bf16_products() == expected


@pytest.mark.parametrize("name", ["_foreach_copy_", "_foreach_lerp_"])
def test_many_tensors_change_alike_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        tensors, others = ([torch.randn(7, 5, generator=generator) for _ in range(3)] for _ in range(2))
        if name == "_foreach_copy_":
            torch_private.copy_all(tensors, others)
        else:
            torch_private.lerp_all(tensors, others, 0.3)
        return tensors

    together = changed()
    monkeypatch.delattr(torch, name)
    assert all(torch.equal(one, other) for one, other in zip(changed(), together, strict=True))
