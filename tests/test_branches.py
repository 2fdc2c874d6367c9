"""Whole branches by compiled code, against double precision and against the same branches in parts."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from operations import dtype_of
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dinov2_fsdp import native
from dinov2_fsdp.models import branches, frugal, fused, products
from dinov2_fsdp.models.frugal_attention import attention_branch
from dinov2_fsdp.models.layout import Layout

_library = native.parallel_library()
pytestmark = pytest.mark.skipif(
    _library is None or not _library.has_branches, reason="branches need AVX-512 and an installation with a compiler"
)

# Dimensions with and without a rest of a group of twelve; more rows than are taken at a time, by blocks and by tiles
# left over, odd and even.
SIZES = [(64, ((3, 47), (2, 5))), (96, ((1, 1600),)), (192, ((5, 33), (7, 10), (1, 2)))]


class Branch(nn.Module):
    """A feed-forward or attention branch of a block whose every parameter differs from what it is made with."""

    def __init__(self, kind: str, dim: int, groups: tuple[tuple[int, int], ...], scaled: bool, onto: bool) -> None:
        super().__init__()
        self.kind, self.layout, self.onto = kind, Layout(groups), onto
        wide, between = (4 * dim, 4 * dim) if kind == "feed forward" else (3 * dim, dim)
        self.norm, self.first, self.second = nn.LayerNorm(dim), nn.Linear(dim, wide), nn.Linear(between, dim)
        self.gamma = nn.Parameter(torch.randn(dim)) if scaled else None
        nn.init.normal_(self.norm.weight, 1, 0.1)
        nn.init.normal_(self.norm.bias, 0, 0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        layers = (self.norm, self.first, self.second)
        if self.kind == "feed forward":
            norm, first, second = layers
            return frugal.feed_forward(tokens, norm, first, "gelu", second, self.gamma, self.onto)
        return attention_branch(tokens, self.layout, 2, *layers, self.gamma, self.onto)

    def plain(self, tokens: Tensor) -> Tensor:
        """The same as plain operations."""
        hidden = self.first(self.norm(tokens))
        if self.kind == "feed forward":
            found = nn.functional.gelu(hidden)
        else:
            parts = []
            for start, end, sequences, length in self.layout.spans():
                qkv = hidden[start:end].view(sequences, length, 3, 2, -1).permute(2, 0, 3, 1, 4)
                weights = (qkv[0] @ qkv[1].mT / qkv.shape[-1] ** 0.5).softmax(-1)
                parts.append((weights @ qkv[2]).transpose(1, 2).reshape(end - start, -1))
            found = torch.cat(parts)
        out = self.second(found)
        out = out if self.gamma is None else out * self.gamma
        return tokens + out if self.onto else out

    def gradients(self, tokens: Tensor, grad: Tensor, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """The result, and the gradients in the tokens and in every parameter."""
        tokens = tokens.clone().requires_grad_()
        self.zero_grad()
        out = run(tokens)
        out.backward(grad)
        return [out.detach(), *(given.grad for given in (tokens, *self.parameters()) if given.grad is not None)]


@pytest.mark.parametrize("scaled", [True, False], ids=["LayerScale", "none"])
@pytest.mark.parametrize("onto", [True, False], ids=["added to its tokens", "alone"])
@pytest.mark.parametrize(("dim", "groups"), SIZES)
@pytest.mark.parametrize("kind", ["feed forward", "attention"])
def test_a_branch_and_its_gradients_are_those_of_double_precision(
    kind: str,
    dim: int,
    groups: tuple[tuple[int, int], ...],
    onto: bool,
    scaled: bool,
    how: int,
    random: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    branch = Branch(kind, dim, groups, scaled, onto).to(dtype_of(how))
    rows = sum(sequences * length for sequences, length in groups)
    tokens, grad = random(rows, dim).to(dtype_of(how)), random(rows, dim).to(dtype_of(how))
    exact = copy.deepcopy(branch).double()
    expected = exact.gradients(tokens.double(), grad.double(), exact.plain)
    also, parts = (branch.norm.weight, branch.norm.bias), 3 if kind == "attention" else 1
    assert branches.applies(tokens, branch.first, branch.second, also=also, parts=parts)
    found = branch.gradients(tokens, grad, branch)
    monkeypatch.setattr(branches, "applies", lambda *_, **__: False)
    in_parts = branch.gradients(tokens, grad, branch)
    for one, part, right in zip(found, in_parts, expected, strict=True):
        assert one.dtype == dtype_of(how)
        error, of_parts = (float((some.double() - right).norm() / right.norm()) for some in (one, part))
        assert error <= max(2 * of_parts, 1e-6)
        # Not only as bad as something else.
        assert error <= (5e-6 if how == fused.BY_FP32 else 1.5e-2)


@pytest.mark.parametrize("kind", ["feed forward", "attention"])
def test_neither_threads_nor_rows_at_a_time_change_a_bit(kind: str, how: int, random: Callable[..., Tensor]) -> None:
    """More threads take more rows at a time, from 3 on; there are twice as many here as three take."""
    torch.manual_seed(0)
    branch = Branch(kind, 64, ((10, 471),), True, True).to(dtype_of(how))
    tokens, grad = random(4710, 64).to(dtype_of(how)), random(4710, 64).to(dtype_of(how))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(branch.gradients(tokens, grad, branch))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("kind", ["feed forward", "attention"])
def test_without_a_backward_pass_the_result_is_the_same(kind: str, how: int, random: Callable[..., Tensor]) -> None:
    branch = Branch(kind, 64, ((3, 47),), True, True).to(dtype_of(how))
    tokens = random(141, 64).to(dtype_of(how))
    with torch.no_grad():
        found = branch(tokens)
    assert not found.requires_grad
    assert torch.equal(found, branch(tokens).detach())


@pytest.mark.parametrize("kind", ["feed forward", "attention"])
def test_what_a_branch_multiplies_is_counted(kind: str, random: Callable[..., Tensor]) -> None:
    branch, tokens = Branch(kind, 64, ((3, 47),), True, True), random(141, 64)
    with FlopCounterMode(display=False) as counter:
        branch.gradients(tokens, tokens, branch)
    linear = 2 * 141 * (branch.first.weight.numel() + branch.second.weight.numel())
    attended = 4 * 141 * 47 * 64 if kind == "attention" else 0
    assert counter.get_total_flops() == 3 * (linear + attended)  # twice as much backward


@pytest.mark.parametrize("rows", [96, 1601])
def test_products_alone_are_those_of_double_precision(rows: int, how: int, random: Callable[..., Tensor]) -> None:
    left, right, weight = (random(*shape).to(dtype_of(how)) for shape in [(rows, 64), (rows, 96), (160, 64)])
    for found, exact in (
        (branches.product(left, weight), left.double() @ weight.double().t()),
        (branches.product_of_rows(left, right), left.double().t() @ right.double()),
    ):
        assert found is not None
        assert (found.double() - exact).norm() <= (1e-6 if how == fused.BY_FP32 else 3e-3) * exact.norm()
    assert branches.product(left, weight[:, :50].contiguous()) is None
    assert branches.product(left.double(), weight.double()) is None
    assert branches.product(left, weight[:, :32].contiguous()) is None
    assert branches.product_of_rows(left, right[1:].contiguous()) is None


def test_a_gradient_with_gaps_is_taken(how: int, random: Callable[..., Tensor]) -> None:
    """As it comes from a sum: one value for all rows."""
    for kind in ("feed forward", "attention"):
        branch = Branch(kind, 64, ((3, 47),), True, True).to(dtype_of(how))
        tokens, grad = random(141, 64).to(dtype_of(how)), random(1, 64).to(dtype_of(how))
        expected = branch.gradients(tokens, grad.expand(141, 64).contiguous(), branch)
        found = branch.gradients(tokens, grad.expand(141, 64), branch)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("dim", [64, 48], ids=["whole", "in parts"])
@pytest.mark.parametrize("kind", ["feed forward", "attention"])
def test_a_backward_pass_may_be_under_an_autocast(kind: str, dim: int, how: int, random: Callable[..., Tensor]) -> None:
    branch = Branch(kind, dim, ((3, 47),), True, True).to(dtype_of(how))
    tokens = random(141, dim).to(dtype_of(how)).requires_grad_()
    given, found = (tokens, *branch.parameters()), []
    for enabled in (False, True):
        out = branch(tokens)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(out, given, torch.ones_like(out)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["feed forward", "attention"])
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_nothing_depends_on_torchs_default_type(
    default: torch.dtype, kind: str, how: int, random: Callable[..., Tensor]
) -> None:
    branch = Branch(kind, 64, ((3, 47),), True, True).to(dtype_of(how))
    tokens, grad = random(141, 64).to(dtype_of(how)), random(141, 64).to(dtype_of(how))
    expected = branch.gradients(tokens, grad, branch)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        found = branch.gradients(tokens, grad, branch)
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["feed forward", "attention"])
def test_every_gradient_has_memory_of_its_own(kind: str, random: Callable[..., Tensor]) -> None:
    """What is saved or freed of one is not all of them."""
    branch, tokens = Branch(kind, 64, ((3, 47),), True, True), random(141, 64)
    found = branch.gradients(tokens, tokens, branch)
    assert len({one.untyped_storage().data_ptr() for one in found}) == len(found)
    assert all(one.untyped_storage().nbytes() == one.nbytes for one in found)


@pytest.mark.parametrize("rows", [10_000, 100_000])
def test_rounding_does_not_grow_with_the_rows_of_a_weights_gradient(rows: int, random: Callable[..., Tensor]) -> None:
    """Values of one sign, where every sum is larger than the one before: libraries sum up a few by themselves too."""
    left, right = (random(rows, 32).abs() for _ in range(2))
    exact = left.double().t() @ right.double()
    found, torchs = branches.product_of_rows(left, right), left.t() @ right
    assert found is not None
    error, of_torch = (float((some.double() - exact).norm() / exact.norm()) for some in (found, torchs))
    # One sum over all of them is 1.5e-6 and 5e-6 off.
    assert error <= max(2 * of_torch, 3e-7)


def test_what_a_branch_cannot_take_goes_another_way(random: Callable[..., Tensor]) -> None:
    tokens, first, second = random(100, 64), nn.Linear(64, 256), nn.Linear(256, 64)
    small = (torch.ones(64),)
    assert branches.applies(tokens, first, second, also=small)
    assert not branches.applies(tokens, nn.Linear(64, 100), nn.Linear(100, 64))  # no whole panels
    assert not branches.applies(tokens, nn.Linear(64, 256, bias=False), second)
    assert not branches.applies(tokens.double(), first.double(), second.double())
    assert not branches.applies(tokens[:10], first.float(), second.float())  # too few to gain anything
    assert not branches.applies(tokens, first, second, also=(torch.ones(64, dtype=torch.bfloat16),))
    assert not branches.applies(random(64, 100).t(), first, second)  # not one row after the other
    # What does not fit together is refused by torch.
    assert not branches.applies(tokens, nn.Linear(96, 256), second, also=small)
    assert not branches.applies(tokens, first, nn.Linear(256, 96), also=small)
    assert not branches.applies(tokens, first, nn.Linear(128, 64), also=small)
    assert not branches.applies(tokens, first, second, also=(torch.ones(128),))
    assert not branches.applies(tokens, first, second, also=small, parts=3)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        frugal.feed_forward(tokens, nn.LayerNorm(64), nn.Linear(96, 256), "gelu", second, None)
    with native.switched_off():
        assert not branches.applies(tokens, first, second)


def test_heads_of_odd_widths_go_another_way(how: int, random: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    branch, tokens = (
        Branch("attention", 96, ((3, 47),), True, True).to(dtype_of(how)),
        random(141, 96).to(dtype_of(how)),
    )
    layers = (branch.norm, branch.first, branch.second, branch.gamma)
    found = attention_branch(tokens, branch.layout, 32, *layers, onto=True)
    with native.switched_off():
        expected = attention_branch(tokens, branch.layout, 32, *layers, onto=True)
    assert (found - expected).norm() <= (1e-6 if how == fused.BY_FP32 else 1e-2) * expected.norm()


@pytest.mark.parametrize("tiles", [False, True])
def test_where_bf16_has_better_instructions_than_compiled_code_knows_libraries_use_them(
    tiles: bool, random: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """AMX, where the compiler knew none of it: that processor's AVX-512 for bf16 is slower than that for fp32."""
    tokens, layer = random(100, 64).bfloat16(), nn.Linear(64, 64).bfloat16()
    monkeypatch.setattr(products, "processor_maker", lambda: "GenuineIntel")
    monkeypatch.setattr(products, "bf16_is_fast", lambda: True)
    monkeypatch.setattr(fused.loaded(), "has_tiles", tiles)
    assert branches.applies(tokens, layer, layer) is tiles
    assert branches.applies(tokens.float(), layer.float(), layer)
    monkeypatch.setattr(products, "bf16_is_fast", lambda: False)
    assert branches.applies(tokens, layer.bfloat16(), layer)


def test_gelu_rounded_to_bf16_is_as_good_as_an_exact_one(
    use_variant: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, random: Callable[..., Tensor]
) -> None:
    """Its polynomials are shorter where bf16 is multiplied: nearly always the nearest value, else the one beside it.

    As below, what is activated are biases, here every value of bf16 from -8 to 8 that is not next to nothing.
    """
    use_variant("avx512_bf16")
    monkeypatch.setattr(products, "bf16_is_fast", lambda: True)
    monkeypatch.setattr(products, "processor_maker", lambda: "AuthenticAMD")
    x = torch.arange(2**15).to(torch.int16).view(torch.bfloat16)
    x = x[(x >= 2.0**-6) & (x < 8)]
    x = torch.cat([x, -x])
    dim = len(x)
    norm, first, second = nn.LayerNorm(dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
    with torch.no_grad():
        first.weight.zero_()
        first.bias.copy_(x)
        second.weight.copy_(torch.eye(dim))
        second.bias.zero_()
    layers = [layer.bfloat16() for layer in (norm, first, second)]
    tokens = random(47, dim).bfloat16()
    assert branches.applies(tokens, layers[1], layers[2])
    assert branches.how_multiplied(tokens) == fused.BY_BF16
    out = frugal.feed_forward(tokens, layers[0], layers[1], "gelu", layers[2], None)
    out.sum().backward()
    wide = x.double()
    cumulative, density = torch.special.erfc(-wide / 2**0.5) / 2, torch.exp(-wide.square() / 2) / (2 * torch.pi) ** 0.5
    expected = wide * cumulative
    nearest = expected.bfloat16()
    error = (out[7].double() - expected).abs() / expected.abs().clamp(min=1e-30)
    assert (out[7] == nearest).double().mean() > 0.98
    assert (error <= 2**-8 * 1.06).all()  # half a step, and a little
    assert first.bias.grad is not None
    slope = 47 * (cumulative + wide * density)
    off = (first.bias.grad.double() - slope).abs()
    assert (off <= slope.abs() * 2**-8 * 1.06 + 47 * 2e-5).all()


def test_gelu_and_its_slope_are_right_far_into_both_tails(how: int, random: Callable[..., Tensor]) -> None:
    """Weights of the first layer are 0 and the second hands on, so that biases alone are what is activated."""
    torch.manual_seed(0)
    branch = Branch("feed forward", 64, ((3, 47),), scaled=False, onto=False)
    at = torch.linspace(-12, 12, 64)
    with torch.no_grad():
        branch.first.weight.zero_()
        branch.first.bias.zero_()[:64] = at
        branch.second.weight.zero_()[:, :64] = torch.eye(64)
        branch.second.bias.zero_()
    branch, tokens = branch.to(dtype_of(how)), random(141, 64).to(dtype_of(how))
    assert branches.applies(tokens, branch.first, branch.second)
    out = branch(tokens)
    out.sum().backward()
    # torch's own GELU is a difference of numbers near 1 in the left tail, even in double precision.
    x = branch.first.bias[:64].detach().double()
    cumulative, density = torch.special.erfc(-x / 2**0.5) / 2, torch.exp(-x.square() / 2) / (2 * torch.pi) ** 0.5
    assert branch.first.bias.grad is not None
    close = {"rtol": 1e-5 if how == fused.BY_FP32 else 1e-2, "atol": 1e-30}
    torch.testing.assert_close(out[7].double(), x * cumulative, **close)
    # Where the slope changes its sign it is a difference.
    near = {**close, "atol": 141 * (1e-6 if how == fused.BY_FP32 else 1e-3)}
    torch.testing.assert_close(branch.first.bias.grad[:64].double(), 141 * (cumulative + x * density), **near)


@pytest.mark.parametrize("kind", ["feed forward", "attention"])
def test_what_is_no_number_stays_so_and_where_it_is(kind: str, how: int, random: Callable[..., Tensor]) -> None:
    """A diverged run is found by its loss: nothing may turn into a number on the way, nor spread to other images."""
    torch.manual_seed(0)
    branch = Branch(kind, 64, ((3, 47),), scaled=True, onto=False).to(dtype_of(how))
    tokens = random(141, 64).to(dtype_of(how))
    tokens[50, 3] = float("nan")  # of the second sequence
    tokens.requires_grad_()
    assert branches.applies(tokens, branch.first, branch.second, parts=1 if kind == "feed forward" else 3)
    out = branch(tokens)
    out.sum().backward()
    reached = torch.zeros(141, dtype=torch.bool)
    reached[50 if kind == "feed forward" else slice(47, 94)] = True
    assert tokens.grad is not None
    assert branch.first.bias.grad is not None
    for found in (out, tokens.grad):
        assert found[reached].isnan().all()
        assert found[~reached].isfinite().all()
    assert branch.first.bias.grad.isnan().any()
