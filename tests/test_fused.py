"""Compiled code between the products: that it is built, that it is right, and that torch's own takes its place."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from operations import TOLERANCES, dtype_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dinov2_fsdp import native
from dinov2_fsdp.models import frugal, fused

DTYPES = [torch.float32, torch.bfloat16]
SUMS = {torch.float32: {"rtol": 1e-5, "atol": 2e-5}, torch.bfloat16: {"rtol": 1e-5, "atol": 2e-5}}
"""Tolerances of sums over rows, which compiled code keeps in fp32 whatever the type."""


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(found.double(), expected.double(), **TOLERANCES[dtype])


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler")
@pytest.mark.skipif(native.SWITCH in os.environ, reason="the environment says whether it is wanted")
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in native.VARIANTS, reason="nothing is compiled for this processor"
)
def test_an_installation_with_a_compiler_has_compiled_code_on_torchs_own_threads() -> None:
    assert native.variant() in ("amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2")
    assert native.parallel_library() is not None


@pytest.mark.slow
def test_other_packages_with_threads_of_their_own_change_nothing() -> None:
    """scikit-learn's wheel brings an OpenMP library beside torch's."""
    code = "import sklearn.metrics, sklearn.cluster; from dinov2_fsdp import native; print(native.variant())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == native.variant()


def test_what_was_built_from_other_code_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if native.library() is None:
        pytest.skip("nothing was compiled for this processor")
    monkeypatch.setattr(native, "source", lambda: b"something else")
    with caplog.at_level("WARNING"):
        assert native._load.__wrapped__() is None
    assert "install this project again or delete" in caplog.text


@pytest.mark.slow
def test_what_the_environment_switches_off_is_not_loaded() -> None:
    code = "import json; from dinov2_fsdp import native; print(json.dumps([native.variant(), str(native.library())]))"
    environment = {**os.environ, native.SWITCH: "off"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == ["none", "None"]


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs both instruction sets")
def test_both_instruction_sets_give_the_same_but_for_rounding(random: Callable[..., Tensor]) -> None:
    if native.variant() == "none":
        pytest.skip("nothing was compiled")
    code = """
import torch
from dinov2_fsdp import native
from dinov2_fsdp.models import fused
assert native.variant() == "avx2" and native.parallel_library() is not None
x = torch.randn(100, 96, generator=torch.Generator().manual_seed(0))
activated, normed = fused.gelu(x.clone(), None, None)[0], fused.layer_norm(x, x[0], x[1], 1e-6)[0]
print(*map(float, (activated.sum(), normed.sum(), fused.softmax(x).max())))
"""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    x = random(100, 96)
    own = (
        fused.gelu(x.clone(), None, None)[0].sum(),
        fused.layer_norm(x, x[0], x[1], 1e-6)[0].sum(),
        fused.softmax(x).max(),
    )
    assert [float(value) for value in done.stdout.split()] == pytest.approx([float(value) for value in own], rel=1e-4)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_and_its_gradient_are_those_of_double_precision(dtype: torch.dtype, random: Callable[..., Tensor]) -> None:
    hidden, grad = (3 * random(70, 101)).to(dtype), random(70, 101).to(dtype)
    expected = F.gelu(hidden.double())
    close(fused.gelu(hidden.clone(), None, None)[0], expected, dtype)
    wanted = torch.ops.aten.gelu_backward(grad.double(), hidden.double())
    of_hidden, total, activated = fused.gelu_backward(grad.clone(), hidden)
    close(of_hidden, wanted, dtype)
    close(activated, expected, dtype)
    if total.dtype == torch.float32:
        torch.testing.assert_close(total.double(), wanted.sum(0), **SUMS[dtype])
    else:
        close(total / 10, wanted.sum(0) / 10, dtype)
    assert torch.equal(hidden, (3 * Again()(70, 101)).to(dtype))  # what is kept for the backward pass stays as it is


class Again:
    """The numbers of the fixture once more, from the start."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)


def test_softmax_rounded_to_bf16_is_as_good_as_an_exact_one(use_variant: Callable[[str], None]) -> None:
    """Its polynomial is shorter where bf16 is multiplied. Of two keys the lesser one's value is 1, the other's 0."""
    use_variant("avx512_bf16")
    dim, distances = 64, torch.linspace(0.0625, 16, 256).bfloat16()
    qkv = torch.zeros(len(distances), 2, 3, 1, dim, dtype=torch.bfloat16)
    qkv[:, :, 0, 0, 0] = distances[:, None]
    qkv[:, 0, 1, 0, 0] = dim**0.5
    qkv[:, 1, 2] = 1
    found = torch.empty(2 * len(distances), dim, dtype=torch.bfloat16)
    fused.attention(qkv.flatten(0, 1), len(distances), fused.BY_BF16, found)
    exact = torch.exp(-distances.double())
    expected = (exact.bfloat16().double() / (1 + exact)).bfloat16()
    assert (found == found[:, :1]).all()
    assert (found.view(-1, 2, dim)[:, 0, 0] == expected).double().mean() > 0.97
    torch.testing.assert_close(found[::2, 0], expected, rtol=2**-7, atol=0)


def test_a_key_that_is_no_number_is_not_left_out_of_softmax(how: int) -> None:
    qkv = torch.randn(100, 3, 2, 64, generator=torch.Generator().manual_seed(0)).to(dtype_of(how))
    qkv[60, 1, 1] = float("nan")
    found = torch.empty(100, 128, dtype=qkv.dtype)
    fused.attention(qkv, 2, how, found)
    assert found[50:, 64:].isnan().all()
    assert found[:50].isfinite().all()
    assert found[:, :64].isfinite().all()


def test_gelu_keeps_its_relative_precision_where_it_is_next_to_nothing() -> None:
    if native.parallel_library() is None:
        pytest.skip("nothing was compiled for this processor")
    x = torch.linspace(-12, 12, 9999)[None]
    exact = torch.tensor([value * 0.5 * math.erfc(-value / math.sqrt(2)) for value in x[0].double().tolist()])
    relative = ((fused.gelu(x.clone(), None, None)[0].double() - exact) / exact.abs().clamp(min=1e-30)).abs()
    assert relative[x.abs() < 5].max() < 2e-6  # torch's own: .2 at -5
    assert relative.max() < 1e-4
    assert not fused.gelu(torch.full((50, 100), float("nan")), None, None)[0].isfinite().any()
    assert not fused.gelu_backward(torch.full((50, 100), float("nan")), torch.ones(50, 100))[0].isfinite().any()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("keep", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
def test_gelu_adds_a_bias_and_gives_what_is_to_be_kept(
    biased: bool, keep: torch.dtype | None, random: Callable[..., Tensor]
) -> None:
    hidden, bias = random(70, 101), random(101) if biased else None
    expected = hidden.double() + (0 if bias is None else bias.double())
    activated, kept = fused.gelu(hidden.clone(), bias, keep)
    close(activated, F.gelu(expected), torch.float32)
    assert (kept is None) == (keep is None)
    if kept is not None:
        assert kept.dtype == keep
        assert kept.data_ptr() != activated.data_ptr()
        assert torch.equal(kept, (hidden if bias is None else hidden + bias).to(kept.dtype))


@pytest.mark.usefixtures("way")
def test_gelus_gradient_may_be_wider_than_what_was_kept(random: Callable[..., Tensor]) -> None:
    hidden, grad = (3 * random(70, 101)).bfloat16(), random(70, 101)
    of_hidden, total, activated = fused.gelu_backward(grad.clone(), hidden)
    wanted = torch.ops.aten.gelu_backward(grad.double(), hidden.double())
    assert of_hidden.dtype == activated.dtype == torch.float32
    close(of_hidden, wanted, torch.float32)
    close(activated, F.gelu(hidden.double()), torch.float32)
    torch.testing.assert_close(total.double(), wanted.sum(0), **SUMS[torch.float32])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", [(77, 96), (200, 33), (33, 384), (4200, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_and_its_gradients_are_those_of_double_precision(
    dtype: torch.dtype, shape: tuple[int, int], random: Callable[..., Tensor]
) -> None:
    rows, grad = (2 * random(*shape) + 3).to(dtype), random(*shape).to(dtype)
    weight, bias, onto = random(shape[1]).to(dtype), random(shape[1]).to(dtype), random(*shape).to(dtype)
    normed, mean, scale = fused.layer_norm(rows, weight, bias, 1e-5)
    wide = [tensor.double() for tensor in (rows, weight, bias)]
    expected = torch.native_layer_norm(wide[0], [shape[1]], wide[1], wide[2], 1e-5)
    close(normed, expected[0], dtype)
    # The statistics that are exact: torch's of bf16 are in bf16, whose error is not this function's.
    statistics = [tensor.to(mean.dtype) for tensor in expected[1:]]
    for found, right in zip((mean, scale), expected[1:], strict=True):
        close(found.reshape(-1), right.reshape(-1), dtype)
    of_rows, *of_both = fused.layer_norm_backward(grad, rows, *statistics, weight, bias)
    right = torch.ops.aten.native_layer_norm_backward(
        grad.double(), wide[0], [shape[1]], *expected[1:], wide[1], wide[2], [True, True, True]
    )
    # A norm of one value has a scale of 300, and hence errors of so much.
    tolerance = {"rtol": 0.05, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 2e-4}
    torch.testing.assert_close(of_rows.double(), right[0], **tolerance)
    for found, exact in zip(of_both, right[1:], strict=True):
        loose = dtype == torch.bfloat16 and found.dtype == dtype
        limit = {"rtol": 0.1, "atol": 1.5} if loose else {"rtol": 1e-4, "atol": 1e-3}
        torch.testing.assert_close(found.double(), exact, **limit)
    target = torch.empty_like(rows)
    added = fused.layer_norm_backward(grad, rows, *statistics, weight, bias, onto, target)[0]
    assert added is target
    torch.testing.assert_close(added.double(), right[0] + onto.double(), **tolerance)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("columns", [1, 7, 16, 50, 257])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_and_its_gradient_are_those_of_double_precision(
    dtype: torch.dtype, columns: int, random: Callable[..., Tensor]
) -> None:
    scores = (10 * random(6, 800, columns)).to(dtype)
    expected = torch.softmax(scores.double(), -1)
    out = torch.empty_like(scores)
    assert fused.softmax(scores, out) is out
    close(out, expected, dtype)
    grad = random(6, 800, columns).to(dtype)
    right = torch._softmax_backward_data(grad.double(), expected, -1, torch.float64)
    close(fused.softmax_backward(grad, out), right, dtype)
    scores[0, 0, 0] = float("nan")
    found = fused.softmax(scores)
    assert found is scores or dtype != torch.float32
    assert found[0, 0].isnan().all()
    assert found[0, 1:].isfinite().all()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_softmax_leaves_out_is_exactly_nothing(dtype: torch.dtype) -> None:
    scores = torch.tensor([0.0, -200.0, -math.inf, -110.0]).repeat(2000, 1).to(dtype)
    assert torch.equal(fused.softmax(scores), torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(2000, 1).to(dtype))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_too_wide_for_compiled_code_is_torchs(dtype: torch.dtype, random: Callable[..., Tensor]) -> None:
    scores = random(2, 5000).to(dtype)
    expected = torch.softmax(scores, -1)
    assert torch.equal(fused.softmax(scores), expected)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", [(3, 50, 2, 64), (2, 257, 6, 64), (5, 37, 4, 24), (3, 130, 3, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_are_split_and_joined_without_a_change(
    dtype: torch.dtype, shape: tuple[int, ...], random: Callable[..., Tensor]
) -> None:
    sequences, length, heads, dim = shape
    packed = random(sequences * length, 3, heads, dim).to(dtype)
    parts = fused.split_heads(packed, sequences, 0.25)
    plain = packed.view(sequences, length, 3, heads, dim).permute(2, 0, 3, 1, 4).flatten(1, 2)
    assert torch.equal(parts, plain * torch.tensor([0.25, 1, 1], dtype=dtype).view(3, 1, 1, 1))
    target = torch.zeros_like(packed)
    for index, part in enumerate(fused.split_heads(packed, sequences)):
        fused.join_heads(part, sequences, target[:, index])
    assert torch.equal(target, packed)
    turned = plain[1].mT.contiguous()
    target.zero_()
    fused.join_heads(turned.mT, sequences, target[:, 1])
    assert torch.equal(target[:, 1], packed[:, 1])
    assert not target[:, ::2].any()
    fused.join_heads(plain[2].clone(memory_format=torch.contiguous_format), sequences, target[:, 2], 0.5)
    assert torch.equal(target[:, 2], packed[:, 2] * 0.5)


def has_branches() -> bool:
    library = native.parallel_library()
    return library is not None and library.has_branches


@pytest.mark.skipif(not has_branches(), reason="compiled attention needs AVX-512")
@pytest.mark.parametrize("width", [32, 48])  # whose roots do not divide without a rest
def test_compiled_attention_of_huge_scores_is_that_of_double_precision(
    width: int, random: Callable[..., Tensor]
) -> None:
    qkv = random(100, 3, 2, width)
    qkv[:, :2] *= 1e5
    query, key, value = qkv.double().view(2, 50, 3, 2, width).permute(2, 0, 3, 1, 4)
    expected = ((query @ key.mT / width**0.5).softmax(-1) @ value).transpose(1, 2).reshape(100, 2 * width)
    found = torch.full((100, 2 * width), torch.nan)
    fused.attention(qkv, 2, fused.BY_FP32, found)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not has_branches(), reason="compiled attention needs AVX-512")
@pytest.mark.parametrize(
    ("how", "by"),
    [(fused.BY_FP32, None), (fused.WIDENED, None), (fused.BY_BF16, "avx512_bf16"), (fused.BY_BF16, "amx")],
)
@pytest.mark.parametrize(
    "shape",
    # Rows left over by twelves, eights, fours, twos; columns by pairs of vectors and by single ones; odd numbers.
    [(2, 257, 2, 64), (3, 50, 6, 64), (2, 47, 3, 24), (40, 1, 2, 64), (5, 16, 4, 40), (1, 97, 1, 17), (7, 33, 2, 32)],
)
def test_compiled_attention_and_its_gradient_are_those_of_double_precision(
    shape: tuple[int, ...],
    how: int,
    by: str | None,
    use_variant: Callable[[str], None],
    random: Callable[..., Tensor],
) -> None:
    if by is not None:
        use_variant(by)
    sequences, length, heads, dim = shape
    if how == fused.BY_BF16 and dim % 2:
        with pytest.raises(TypeError, match="not multiplied like this"):
            fused.attention(torch.zeros(length, 3, 1, dim).bfloat16(), 1, how, torch.zeros(length, dim).bfloat16())
        return
    dtype = torch.float32 if how == fused.BY_FP32 else torch.bfloat16
    qkv = (2 * random(sequences * length, 3, heads, dim)).to(dtype).requires_grad_()
    wide = qkv.detach().double().requires_grad_()
    query, key, value = wide.view(sequences, length, 3, heads, dim).permute(2, 0, 3, 1, 4)
    weights = (query @ key.mT / dim**0.5).softmax(-1)
    expected = (weights @ value).transpose(1, 2).reshape(sequences * length, heads * dim)
    with torch.no_grad():
        found = torch.full((sequences * length, heads * dim), torch.nan, dtype=dtype)
        assert fused.attention(qkv.detach(), sequences, how, found) is found
        if dtype == torch.float32:
            torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=1e-5)
        # Of bf16: what rounding to it makes of each value, and of the weights before they are multiplied.
        assert (found.double() - expected).norm() <= (1e-6 if dtype == torch.float32 else 3e-3) * expected.norm()
        grad = random(*expected.shape).to(fused.multiplied(how))
        of_qkv = torch.full(qkv.shape, torch.nan, dtype=grad.dtype)
        fused.attention_backward(grad, qkv.detach(), sequences, how, of_qkv)
    expected.backward(grad.double())
    if dtype == torch.float32:
        torch.testing.assert_close(of_qkv.double(), wide.grad, rtol=5e-5, atol=2e-5)
    assert (of_qkv.double() - wide.grad).norm() <= 1e-2 * wide.grad.norm()


@pytest.mark.skipif(not has_branches(), reason="compiled attention needs AVX-512")
@pytest.mark.parametrize("how", [fused.BY_FP32, fused.WIDENED])
def test_a_gradient_of_another_type_is_taken_in_fp32(how: int, random: Callable[..., Tensor]) -> None:
    """As it comes from a backward pass under an autocast that the forward pass was not under."""
    qkv, grad = random(2 * 50, 3, 2, 16), random(2 * 50, 32).bfloat16()
    kept = qkv if how == fused.BY_FP32 else qkv.bfloat16()
    expected = fused.attention_backward(grad.float(), kept, 2, how, torch.empty_like(qkv))
    assert torch.equal(fused.attention_backward(grad, kept, 2, how, torch.empty_like(qkv)), expected)
    with pytest.raises(TypeError, match="no attention for a gradient"):
        torch.ops.dinov2_fsdp.attention_backward(grad, kept, 2, how, torch.empty_like(qkv))
    with pytest.raises(TypeError, match="no attention for a gradient"):
        fused.attention_backward(grad[:50], kept, 2, how, torch.empty_like(qkv))


@pytest.mark.skipif(not has_branches(), reason="compiled attention needs AVX-512")
def test_what_attention_cannot_multiply_is_refused(random: Callable[..., Tensor]) -> None:
    qkv = random(2 * 50, 3, 2, 16)
    with pytest.raises(TypeError, match="not multiplied like this"):
        fused.attention(qkv, 2, fused.WIDENED, qkv.new_empty(100, 32))
    with pytest.raises(TypeError, match="not multiplied like this"):
        fused.attention(qkv.bfloat16(), 2, fused.BY_FP32, torch.empty(100, 32, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="no attention from"):
        fused.attention(qkv, 2, fused.BY_FP32, torch.empty(100, 32, dtype=torch.bfloat16))


@pytest.mark.skipif(not has_branches(), reason="compiled attention needs AVX-512")
def test_what_compiled_attention_multiplies_is_counted(random: Callable[..., Tensor]) -> None:
    qkv = random(2 * 50, 3, 2, 16)
    with FlopCounterMode(display=False) as counter:
        out = torch.empty(2 * 50, 32)
        fused.attention(qkv, 2, fused.BY_FP32, out)
        fused.attention_backward(out, qkv, 2, fused.BY_FP32, torch.empty_like(qkv))
    assert counter.get_total_flops() == 6 * 2 * (2 * 2 * 50 * 50 * 16)
    assert not fused.attention_compiled(qkv.bfloat16())


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", [(64, 96), (101, 77), (5000, 3), (3, 5000), (4, 50, 64), (6, 33, 31)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matrices_are_laid_out_transposed(
    dtype: torch.dtype, shape: tuple[int, ...], random: Callable[..., Tensor]
) -> None:
    matrix = random(*shape).to(dtype)
    found = fused.transposed(matrix)
    assert found.is_contiguous()
    assert torch.equal(found, matrix.mT)
    if matrix.dim() == 3:
        assert torch.equal(fused.laid_out(matrix.mT), matrix.mT)
        assert fused.laid_out(matrix.mT).is_contiguous()
        assert fused.laid_out(matrix) is matrix


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_summed_precisely(dtype: torch.dtype, random: Callable[..., Tensor]) -> None:
    rows = (random(3001, 70) + 1).to(dtype)
    found, exact = fused.sum_rows(rows), rows.double().sum(0)
    limit = 1e-6 if found.dtype == torch.float32 else 1e-2
    assert ((found.double() - exact) / exact).abs().max() < limit
    lain_otherwise = rows.t().contiguous().t()
    assert torch.equal(fused.sum_rows(lain_otherwise), lain_otherwise.sum(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_changes_nothing(dtype: torch.dtype, random: Callable[..., Tensor]) -> None:
    if native.parallel_library() is None:
        pytest.skip("nothing was compiled for this processor")
    rows, grad, weight = random(500, 96).to(dtype), random(500, 96).to(dtype), random(96).to(dtype)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            normed, mean, scale = fused.layer_norm(rows, weight, weight, 1e-6)
            backward = fused.layer_norm_backward(grad, rows, mean, scale, weight, weight)
            found.append([normed, *backward, fused.sum_rows(rows), *fused.gelu_backward(grad.clone(), rows)])
            if has_branches() and dtype == torch.float32:
                qkv = rows[:480].view(5 * 32, 3, 4, 24)
                out = torch.empty(160, 96)
                fused.attention(qkv, 5, fused.BY_FP32, out)
                of_qkv = torch.empty_like(qkv)
                found[-1] += [out, fused.attention_backward(out, qkv, 5, fused.BY_FP32, of_qkv)]
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


def test_what_compiled_code_cannot_take_is_torchs(random: Callable[..., Tensor]) -> None:
    rows = random(100, 96)
    assert fused.compiled(rows) == (native.parallel_library() is not None)
    wide = random(200, 192)
    for other in (rows.double(), rows.half(), wide[:, ::2], wide.t(), rows[:3], torch.empty(100, 96, device="meta")):
        assert not fused.compiled(other)
    assert not fused.compiled(rows, rows.bfloat16())
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert not fused.compiled(torch.empty(100, 96))
    # One dimension more than compiled code knows.
    several, weight = random(2, 50, 96), random(96)
    normed, _, _ = fused.layer_norm(several, weight, weight, 1e-6)
    torch.testing.assert_close(normed, F.layer_norm(several, [96], weight, weight, 1e-6))
    four = random(2, 3, 40, 50)
    assert torch.equal(fused.transposed(four), four.mT)
    assert fused.sum_rows(several).shape == (50, 96)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_backward_pass_need_not_be_compiled_because_the_forward_pass_was(
    dtype: torch.dtype, random: Callable[..., Tensor]
) -> None:
    norm, linear = torch.nn.LayerNorm(48).to(dtype), torch.nn.Linear(48, 96).to(dtype)
    tokens = random(300, 48).to(dtype).requires_grad_()
    out = frugal.norm_linear(tokens, norm, linear)
    expanded = torch.autograd.grad(out.sum(), tokens, retain_graph=True)[0]  # one value for all: lies nowhere in full
    with native.switched_off():
        close(torch.autograd.grad(out.sum(), tokens)[0] / 10, expanded / 10, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_branch_has_the_same_gradients_with_and_without(dtype: torch.dtype, random: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(48).to(dtype)
    first, second = torch.nn.Linear(48, 96).to(dtype), torch.nn.Linear(96, 48).to(dtype)
    gamma, tokens = torch.nn.Parameter(random(48).to(dtype)), random(300, 48).to(dtype)
    parameters = [*norm.parameters(), *first.parameters(), *second.parameters(), gamma]

    def found() -> list[Tensor]:
        rows = tokens.clone().requires_grad_()
        out = frugal.feed_forward(rows, norm, first, "gelu", second, gamma, onto=True)
        return [out, *torch.autograd.grad(out.square().sum(), [rows, *parameters])]

    with_it = found()
    with native.switched_off():
        without = found()
    for one, other in zip(with_it, without, strict=True):
        assert one.dtype == other.dtype == dtype
        scale = other.double().abs().max()
        limit = 1e-5 if dtype == torch.float32 else 2e-2
        assert (one.double() - other.double()).abs().max() <= limit * scale
