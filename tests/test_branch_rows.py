"""Stochastic depth by compiled code: a block whose branches read chosen rows, and are added to them there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from operations import dtype_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from training import tiny_run, train_alone

from dinov2_fsdp import native
from dinov2_fsdp.models import branches, fused
from dinov2_fsdp.models.block import Block
from dinov2_fsdp.models.layout import Layout
from dinov2_fsdp.models.stochastic_depth import Subset, draw_plan

_library = native.parallel_library()
pytestmark = pytest.mark.skipif(
    _library is None or not _library.has_branches, reason="branches need AVX-512 and an installation with a compiler"
)

GROUPS = ((20, 47), (33, 5), (1, 3))


def random_block(dim: int = 64, scaled: bool = True) -> Block:
    torch.manual_seed(0)
    block = Block(dim, 2, 4 * dim, "mlp", scaled)
    block.attn.backend = "math"
    for name, parameter in block.named_parameters():
        ones = "norm" in name and "weight" in name
        nn.init.normal_(parameter, float(ones), 0.1 if parameter.ndim == 1 else dim**-0.5)
    return block


def subsets_of(groups: tuple[tuple[int, int], ...], drop: float = 0.4) -> tuple[Subset, Subset]:
    plan = draw_plan(Layout(groups), 1, drop, np.random.default_rng(0))
    assert plan is not None
    return plan.subset(0), plan.subset(1)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every branch that ran on chosen rows, whether it was a block's second."""
    found: list[bool] = []
    place = branches._place
    monkeypatch.setattr(branches, "_place", lambda ctx, x, chosen: found.append(chosen.second) or place(ctx, x, chosen))
    return found


def gradients(block: Block, tokens: Tensor, grad: Tensor, subsets: tuple[Subset, Subset]) -> list[Tensor]:
    tokens = tokens.clone().requires_grad_()
    out = block(tokens, Layout(GROUPS), *subsets)
    found = torch.autograd.grad(out, (tokens, *block.parameters()), grad)
    return [out.detach(), *found]


@pytest.mark.parametrize("drop", [0.4, 0.97], ids=["most", "a single sequence"])
@pytest.mark.parametrize("scaled", [True, False], ids=["LayerScale", "none"])
def test_a_block_on_chosen_rows_is_that_of_double_precision(
    scaled: bool,
    drop: float,
    how: int,
    random: Callable[..., Tensor],
    used: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block, subsets, rows = random_block(scaled=scaled).to(dtype_of(how)), subsets_of(GROUPS, drop), 1108
    tokens, grad = random(rows, 64).to(dtype_of(how)), random(rows, 64).to(dtype_of(how))
    expected = gradients(copy.deepcopy(block).double(), tokens.double(), grad.double(), subsets)
    assert used == []
    found = gradients(block, tokens, grad, subsets)
    assert used == [False, True]
    monkeypatch.setattr(branches.Chosen, "fit", lambda *_: False)
    apart = gradients(block, tokens, grad, subsets)
    assert used == [False, True]
    for one, other, right in zip(found, apart, expected, strict=True):
        assert one.dtype == dtype_of(how)
        error, of_other = (float((some.double() - right).norm() / right.norm()) for some in (one, other))
        assert error <= max(2 * of_other, 1e-6)
        assert error <= (5e-6 if how == fused.BY_FP32 else 2e-2)
    # What neither branch has chosen passes.
    kept = torch.cat([subset.rows for subset in subsets])
    others = torch.ones(rows, dtype=torch.bool).index_fill(0, kept, value=False)
    assert others.any()
    assert torch.equal(found[0][others], tokens[others])
    assert torch.equal(found[1][others], grad[others])


def test_a_block_leaves_what_it_was_given_as_it_was(how: int, random: Callable[..., Tensor], used: list[bool]) -> None:
    """Its branches overwrite what stands between them alone: neither tokens, nor a gradient that others get as well."""
    block, subsets = random_block().to(dtype_of(how)), subsets_of(GROUPS)
    tokens, grad = (random(1108, 64).to(dtype_of(how)).requires_grad_() for _ in range(2))
    given, upstream, beside = tokens.detach().clone(), grad.detach().clone(), torch.zeros_like(tokens).requires_grad_()
    out = block(tokens, Layout(GROUPS), *subsets) + beside
    first = out.detach().clone()
    out.backward(grad)
    assert used == [False, True]
    assert torch.equal(tokens, given)
    assert torch.equal(grad, upstream)
    assert beside.grad is not None
    assert torch.equal(beside.grad, upstream)
    assert torch.equal(out, first)


def test_blocks_in_a_row_find_what_they_kept(how: int, random: Callable[..., Tensor]) -> None:
    """Intermediate results that are read as well, computed again or not, and without a backward pass."""
    blocks, subsets, tokens = [random_block().to(dtype_of(how)) for _ in range(3)], subsets_of(GROUPS), []
    given = random(1108, 64).to(dtype_of(how))

    def run(again: bool) -> tuple[Tensor, ...]:
        x, found = given.clone().requires_grad_(), []
        tokens.append(x)
        for block in blocks:
            arguments = (tokens[-1] if not found else found[-1], Layout(GROUPS), *subsets)
            found.append(checkpoint(block, *arguments, use_reentrant=False) if again else block(*arguments))
        of = torch.autograd.grad(sum((i + 1) * y.float().square().sum() for i, y in enumerate(found)), x)
        return *(y.detach() for y in found), *of

    plain, again = run(False), run(True)
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    with torch.no_grad():
        x = given.clone()
        for block, expected in zip(blocks, plain, strict=False):
            x = block(x, Layout(GROUPS), *subsets)
            assert torch.equal(x, expected)


def test_threads_change_no_bit_of_chosen_rows(how: int, random: Callable[..., Tensor]) -> None:
    block, subsets = random_block().to(dtype_of(how)), subsets_of(GROUPS)
    tokens, grad = random(1108, 64).to(dtype_of(how)), random(1108, 64).to(dtype_of(how))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(gradients(block, tokens, grad, subsets))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


def test_chosen_rows_alone_are_counted(random: Callable[..., Tensor], used: list[bool]) -> None:
    block, groups = random_block(), ((10, 47), (30, 5))

    def flops(drop: float) -> int:
        subsets = subsets_of(groups, drop) if drop else (None, None)
        with FlopCounterMode(display=False) as counter:
            block(random(620, 64).requires_grad_(), Layout(groups), *subsets).sum().backward()
        return counter.get_total_flops()

    assert flops(0.4) == flops(0.0) * 6 // 10 > 0
    assert used == [False, True]


@pytest.mark.parametrize("branch", [0, 1], ids=["attention", "feed forward"])
@pytest.mark.parametrize("row", [-1, 1108])
def test_chosen_rows_that_are_not_there_are_refused(row: int, branch: int, random: Callable[..., Tensor]) -> None:
    subsets = subsets_of(GROUPS)
    subsets[branch].rows[3] = row
    with pytest.raises((IndexError, RuntimeError)):
        random_block()(random(1108, 64).requires_grad_(), Layout(GROUPS), *subsets)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_takes_chosen_rows_this_way(precision: str, tmp_path: Path, used: list[bool]) -> None:
    """FSDP casts what it finds in a unit's arguments, but not what a row's result is multiplied by."""
    sizes = {"model__dim": 64, "model__heads": 2, "model__depth": 2, "model__drop_path": 0.4}
    crops = {"crops__global_size": 64, "train__duration": "1it", "train__batch": 8, "train__microbatch": 8}
    train_alone(tiny_run(tmp_path / "run", train__precision=precision, **sizes, **crops))
    assert used == [False, True]  # of the last block few rows are read


@pytest.mark.slow
def test_a_compiled_block_learns_the_same_on_chosen_rows(random: Callable[..., Tensor]) -> None:
    block, subsets = random_block(), subsets_of(GROUPS)
    tokens, grad = random(1108, 64), random(1108, 64)
    expected = gradients(block, tokens, grad, subsets)
    torch.compiler.reset()
    block.compile(dynamic=True, fullgraph=True)
    found = gradients(block, tokens, grad, subsets)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
