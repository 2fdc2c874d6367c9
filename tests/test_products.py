"""Matrix products on a CPU: by which library, in which shapes, and that they are right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from operations import TOLERANCES, Called, gradients
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dinov2_fsdp.models import products


@pytest.mark.usefixtures("maker")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_products_are_those_of_torch(dtype: torch.dtype, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, bias = torch.randn(37, 20, generator=generator), torch.randn(12, generator=generator)
    weight = torch.randn(20, 12, generator=generator).t() if transposed else torch.randn(12, 20, generator=generator)
    rows, weight, bias = rows.to(dtype), weight.to(dtype), bias.to(dtype)
    with torch.no_grad():
        for used in (bias, None):
            expected = F.linear(rows.double(), weight.double(), None if used is None else used.double())
            torch.testing.assert_close(products.linear(rows, weight, used).double(), expected, **TOLERANCES[dtype])


@pytest.mark.usefixtures("maker")
@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4), (0, 4)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_with_derivatives_are_those_of_torch(dtype: torch.dtype, bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer, plain = products.Linear(4, 5, bias).to(dtype), nn.Linear(4, 5, bias).double()
    plain.load_state_dict(layer.state_dict())
    rows = torch.randn(shape, dtype=dtype)
    found = gradients(layer, rows, list(layer.parameters()))
    for own, other in zip(found, gradients(plain, rows.double(), list(plain.parameters())), strict=True):
        assert own.dtype == dtype
        torch.testing.assert_close(own.double(), other, **TOLERANCES[dtype])


@pytest.mark.skipif(not products._knows_bf16() or not products._has_onednn(), reason="bf16 is not oneDNN's here")
def test_few_rows_of_bf16_have_one_of_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "bf16_is_fast", lambda: True)
    layer, found = products.Linear(4, 5).bfloat16(), []
    for count in (65, 100, 127, 128, 129):
        with Called() as called:
            layer(torch.randn(count, 4, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
        pairs = zip(called.names, called.shapes, strict=True)
        found.append([shapes for name, shapes in pairs if name in ("mm", "addmm")])
        assert len(found[-1]) == 3
    assert found[0] == found[1] == found[2] == found[3] != found[4]


@pytest.mark.usefixtures("maker")
def test_products_give_only_the_derivatives_that_are_wanted() -> None:
    rows, weight = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    products.linear(rows, weight).sum().backward()
    torch.testing.assert_close(weight.grad, rows.sum(0).expand(5, 4))
    rows.requires_grad_()
    products.linear(rows, weight.detach()).sum().backward()
    torch.testing.assert_close(rows.grad, weight.detach().sum(0).expand(3, 4))


@pytest.mark.usefixtures("maker")
def test_products_compute_in_another_type_where_autocast_says_so() -> None:
    layer, rows = products.Linear(4, 5), torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(rows).dtype == torch.bfloat16


@pytest.mark.usefixtures("maker")
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_products_of_rows_and_of_batches_are_those_of_torch(dtype: torch.dtype, turned: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(7, 33, width, generator=generator).to(dtype) for width in (12, 20))
    with torch.no_grad():
        expected = left.double().transpose(1, 2) @ right.double()
        if turned:
            left, right, expected = right, left, expected.transpose(1, 2)
        found = products.product_of_rows(left[0], right[0])
        torch.testing.assert_close(found.double(), expected[0], **TOLERANCES[dtype])
        found = products.bmm(left.transpose(1, 2), right)
        torch.testing.assert_close(found.double(), expected, **TOLERANCES[dtype])
        found = products.bmm(left.transpose(1, 2).contiguous(), right.transpose(1, 2).contiguous().transpose(1, 2))
        torch.testing.assert_close(found.double(), expected, **TOLERANCES[dtype])


AMD, INTEL = "vendor_id\t: AuthenticAMD\nmodel\t: 17\n", "vendor_id\t: GenuineIntel\nmodel\t: 207\n"


@pytest.mark.parametrize(
    ("text", "maker", "fast"),
    [
        (f"{AMD}flags\t\t: fpu avx512f avx512_bf16 hle\n\n{INTEL}", "AuthenticAMD", True),
        (f"{AMD}flags\t\t: fpu avx2\n", "AuthenticAMD", False),
        (f"{INTEL}flags\t\t: fpu avx512f avx512_bf16 amx_bf16 amx_tile\n", "GenuineIntel", True),
        (f"{INTEL}flags\t\t: fpu avx512f avx512_bf16\n", "GenuineIntel", False),
        (f"{INTEL}flags\t\t: fpu avx2\n", "GenuineIntel", False),
        ("processor\t: 0\nFeatures\t: fp asimd\n", "", True),
        ("", "", True),
    ],
)
def test_a_processor_says_who_made_it_and_whether_it_is_fast_in_bf16(
    text: str, maker: str, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pathlib.Path.read_text", lambda _: text)
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr(products, "_processor", products._processor.__wrapped__)
    assert products.processor_maker() == maker
    assert products.bf16_is_fast.__wrapped__() == fast


def test_bf16_is_multiplied_in_fp32_where_a_processor_is_slow_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rows, weight = torch.randn(50, 40).bfloat16(), torch.randn(30, 40).bfloat16()
    exact = rows.double() @ weight.double().t()
    for fast, error in ((True, 1e-2), (False, 1e-6)):
        monkeypatch.setattr(products, "bf16_is_fast", lambda fast=fast: fast)
        with torch.no_grad():
            out = products.linear(rows, weight)
            product = products.product_of_rows(rows.t(), weight.t())
        assert out.dtype == torch.bfloat16
        # Rounded once, but where fp32's own rounding crosses the middle between two values of bf16.
        assert fast or (out != exact.bfloat16()).double().mean() < 0.005
        assert product.dtype == (torch.bfloat16 if fast else torch.float32)
        assert (product.double() - exact).norm() <= error * exact.norm()
        for few in (2**24, 100):  # a few rows at a time
            monkeypatch.setattr(products, "WIDENED", few)
            with torch.no_grad():
                assert (products.linear(rows, weight).double() - exact).norm() <= 1e-2 * exact.norm()
                again = products.product_of_rows(rows.t(), weight.t())
                assert (again.double() - exact).norm() <= error * exact.norm()
        with torch.autocast("cpu", torch.bfloat16):
            assert not products.widens(rows)
        assert not products.widens(rows.float())
        with FakeTensorMode():
            assert not products.widens(torch.randn(5, 4).bfloat16())


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch without MKL has oneDNN alone")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mkl_multiplies_in_fp32_on_processors_of_its_maker(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "processor_maker", lambda: "GenuineIntel")
    batch = torch.randn(2, 5, 5, dtype=dtype)
    with torch.no_grad(), Called() as called:
        products.linear(batch[0], batch[1])
        products.product_of_rows(batch[0], batch[1])
        products.bmm(batch, batch)
        products.packed(batch[0].float(), products.LEAST_PARTS)
    assert not {"_linear_pointwise", "convolution", "_reorder_linear_weight"} & set(called.names)


@pytest.mark.usefixtures("foreign")
def test_onednn_multiplies_in_fp32_where_the_processor_has_wide_registers() -> None:
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    for dtype, expected in ((torch.float32, wide), (torch.bfloat16, False), (torch.float64, False)):
        with torch.no_grad(), Called() as called:
            products.linear(torch.randn(5, 4, dtype=dtype), torch.randn(3, 4, dtype=dtype))
        assert ("_linear_pointwise" in called.names) == expected
        batch = torch.randn(2, 5, 5, dtype=dtype)
        with torch.no_grad(), Called() as called:
            products.product_of_rows(batch[0], batch[1])
            products.bmm(batch, batch)
        assert called.names.count("_linear_pointwise") == called.names.count("convolution") == expected
        assert ("bmm" in called.names) == ("mm" in called.names) == (not expected)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), Called() as called:
        products.linear(torch.randn(5, 4), torch.randn(3, 4))
        products.product_of_rows(torch.randn(5, 4), torch.randn(5, 3))
        products.bmm(torch.randn(2, 5, 5), torch.randn(2, 5, 5))
    assert not {"_linear_pointwise", "convolution"} & set(called.names)


@pytest.mark.usefixtures("foreign")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_does_not_fit_together_is_refused_as_torch_does(dtype: torch.dtype) -> None:
    rows, weight = torch.randn(100, 96, dtype=dtype), torch.randn(256, 64, dtype=dtype, requires_grad=True)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        products.linear(rows, weight)


@pytest.mark.usefixtures("foreign")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inference", [False, True])
def test_a_weight_laid_out_for_many_products_gives_the_same(dtype: torch.dtype, inference: bool) -> None:
    weight, bias = torch.randn(48, 40, dtype=torch.float64), torch.randn(48, dtype=torch.float64)
    with torch.inference_mode(inference), torch.no_grad():
        packed = products.packed(weight.to(dtype), products.LEAST_PARTS)
        assert packed.is_mkldnn == (torch.backends.cpu.get_cpu_capability() == "AVX512")
        for count in (1, 7, 300):
            rows = torch.randn(count, 40, dtype=torch.float64)
            found = products.linear(rows.to(dtype), packed, bias.to(dtype)).double()
            expected = rows @ weight.t() + bias
            assert (found - expected).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * expected.norm()


def test_a_weight_is_laid_out_only_where_that_pays_and_can_be() -> None:
    weight, enough = torch.randn(8, 4), products.LEAST_PARTS
    assert products.packed(weight, enough) is weight  # with gradients
    with torch.no_grad():
        assert products.packed(weight, enough - 1) is weight
        wide = weight.double()
        assert products.packed(wide, enough) is wide
        with torch.backends.mkldnn.flags(enabled=False):
            assert products.packed(weight, enough) is weight
        with FakeTensorMode():
            fake = torch.randn(8, 4)
            assert products.packed(fake, enough) is fake
