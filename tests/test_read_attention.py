"""The last block's attention for what is read: compiled code against attention of all tokens, in double precision."""

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
from dinov2_fsdp.models import fused, read_attention
from dinov2_fsdp.models.block import Block
from dinov2_fsdp.models.branch_operations import operations
from dinov2_fsdp.models.layout import Layout
from dinov2_fsdp.models.stochastic_depth import Subset, draw_plan

_library = native.parallel_library()
pytestmark = pytest.mark.skipif(
    _library is None or not _library.has_branches, reason="branches need AVX-512 and an installation with a compiler"
)

GROUPS = ((9, 77), (33, 5), (1, 3))
LAYOUT = Layout(GROUPS)
DIM, HEADS = 64, 2


def random_block(scaled: bool = True) -> Block:
    torch.manual_seed(0)
    block = Block(DIM, HEADS, 4 * DIM, "mlp", scaled)
    block.attn.backend = "math"
    for name, parameter in block.named_parameters():
        ones = "norm" in name and "weight" in name
        nn.init.normal_(parameter, float(ones), 0.1 if parameter.ndim == 1 else DIM**-0.5)
    return block


def rows_read() -> Tensor:
    """Class tokens, and after them patches as heads ask for them: many of one sequence, few, or none; in no order."""
    patches = [*range(1, 77), 77 + 5, 2 * 77 + 70, 2 * 77 + 3, *range(4 * 77 + 1, 4 * 77 + 34), 9 * 77 + 4]
    patches = np.random.default_rng(0).permutation(patches)
    return torch.cat([LAYOUT.first_rows(torch.device("cpu")), torch.from_numpy(patches)])


def subsets_of(drop: float) -> tuple[Subset | None, Subset | None]:
    plan = draw_plan(LAYOUT, 1, drop, np.random.default_rng(0))
    return (None, None) if plan is None else (plan.subset(0), plan.subset(1))


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many queries each attention of what is read had."""
    found: list[int] = []
    read_of = read_attention.read_of

    def spy(*arguments: object) -> read_attention.Read:
        read = read_of(*arguments)  # type: ignore[arg-type]
        found.append(len(read.rows))
        return read

    monkeypatch.setattr(read_attention, "read_of", spy)
    return found


def gradients(block: Block, tokens: Tensor, grad: Tensor, drop: float) -> list[Tensor]:
    tokens = tokens.clone().requires_grad_()
    out = block(tokens, LAYOUT, *subsets_of(drop), rows_read())
    return [out.detach(), *torch.autograd.grad(out, (tokens, *block.parameters()), grad)]


def inputs(random: Callable[..., Tensor], how: int) -> tuple[Tensor, Tensor]:
    return tuple(random(count, DIM).to(dtype_of(how)) for count in (LAYOUT.total_tokens, len(rows_read())))  # type: ignore[return-value]


@pytest.mark.parametrize("drop", [0.0, 0.4, 0.97], ids=["all", "most", "a single sequence"])
@pytest.mark.parametrize("scaled", [True, False], ids=["LayerScale", "none"])
def test_what_is_read_is_that_of_double_precision(
    scaled: bool,
    drop: float,
    how: int,
    random: Callable[..., Tensor],
    used: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block, (tokens, grad) = random_block(scaled).to(dtype_of(how)), inputs(random, how)
    expected = gradients(copy.deepcopy(block).double(), tokens.double(), grad.double(), drop)
    assert used == []
    found = gradients(block, tokens, grad, drop)
    assert len(used) == 1
    assert (used[0] == len(grad)) == (drop == 0)
    monkeypatch.setattr(Block, "_attention_read", lambda *_: None)
    of_all = gradients(block, tokens, grad, drop)
    assert len(used) == 1
    for one, other, right in zip(found, of_all, expected, strict=True):
        assert one.dtype == dtype_of(how)
        error, of_other = (float((some.double() - right).norm() / right.norm()) for some in (one, other))
        assert error <= max(2 * of_other, 1e-6)
        assert error <= (5e-6 if how == fused.BY_FP32 else 2e-2)


STARTS = [0, 0, 1, 34, 34, 67, 83, 160, 177]
"""Sequences of 77 keys: without queries, with one, with one panel of them and one more, with all."""


@pytest.mark.parametrize("heads", [1, 2])
def test_attention_of_some_queries_and_its_gradients_are_those_of_double_precision(
    heads: int, how: int, random: Callable[..., Tensor]
) -> None:
    length, dim, sequences, dtype = 77, DIM, len(STARTS) - 1, dtype_of(how)
    starts, count = torch.tensor(STARTS), STARTS[-1]
    query, keys, grad = (
        random(*shape).to(dtype) for shape in ((count, dim), (sequences * length, 2 * dim), (count, dim))
    )
    parts = (query, keys, starts, heads, how, count * length)
    found = torch.empty_like(query)
    operations.attention_of(*parts, found)
    of_query, of_keys = (torch.empty_like(part, dtype=fused.multiplied(how)) for part in (query, keys))
    operations.attention_of_backward(grad.to(of_query.dtype), *parts, of_query, of_keys)

    exact_query, exact_keys = query.double().requires_grad_(), keys.double().requires_grad_()
    sequence = np.repeat(np.arange(sequences), np.diff(STARTS))
    both = exact_keys.view(sequences, length, 2, heads, -1)[sequence]
    asked = exact_query.view(count, heads, -1)
    scores = torch.einsum("qhd,qkhd->qhk", asked, both[:, :, 0]) * (dim // heads) ** -0.5
    expected = torch.einsum("qhk,qkhd->qhd", scores.softmax(-1), both[:, :, 1]).flatten(1)
    wanted = torch.autograd.grad(expected, (exact_query, exact_keys), grad.double())
    tolerance = 2e-6 if how == fused.BY_FP32 else 1.5e-2
    for one, right in zip((found, of_query, of_keys), (expected, *wanted), strict=True):
        assert float((one.double() - right).norm() / right.norm()) < tolerance
    nobody = of_keys.view(sequences, length, -1)[torch.from_numpy(np.diff(STARTS) == 0)]
    assert torch.equal(nobody, torch.zeros_like(nobody))  # asks these for anything


def test_threads_change_no_bit_of_what_is_read(how: int, random: Callable[..., Tensor]) -> None:
    block, given = random_block().to(dtype_of(how)), inputs(random, how)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(gradients(block, *given, 0.4))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


def test_a_block_that_is_read_leaves_what_it_was_given(how: int, random: Callable[..., Tensor]) -> None:
    block, (tokens, grad) = random_block().to(dtype_of(how)), inputs(random, how)
    given, upstream = tokens.clone(), grad.clone()
    first = gradients(block, tokens, grad, 0.4)
    assert torch.equal(tokens, given)
    assert torch.equal(grad, upstream)
    x = tokens.clone().requires_grad_()
    again = checkpoint(block, x, LAYOUT, *subsets_of(0.4), rows_read(), use_reentrant=False)
    assert torch.equal(again, first[0])
    assert torch.equal(torch.autograd.grad(again, x, grad)[0], first[1])
    with torch.no_grad():
        assert torch.equal(block(tokens, LAYOUT, *subsets_of(0.4), rows_read()), first[0])


def test_queries_that_are_read_alone_are_counted(random: Callable[..., Tensor], used: list[int]) -> None:
    block, rows = random_block(), rows_read()
    with FlopCounterMode(display=False) as counter:
        block(random(LAYOUT.total_tokens, DIM).requires_grad_(), LAYOUT, None, None, rows).sum().backward()
    lengths = np.repeat(LAYOUT.lengths, LAYOUT.lengths)
    per_row = 2 * DIM * (DIM + DIM + 8 * DIM)  # query and projection, feed-forward
    forward = 4 * DIM * DIM * LAYOUT.total_tokens + per_row * len(rows) + int(4 * DIM * lengths[rows].sum())
    assert counter.get_total_flops() == 3 * forward
    assert used == [len(rows)]


@pytest.mark.parametrize("row", [-1, LAYOUT.total_tokens])
def test_rows_that_are_not_there_are_refused(row: int, random: Callable[..., Tensor]) -> None:
    with pytest.raises((IndexError, RuntimeError)):
        random_block()(random(LAYOUT.total_tokens, DIM), LAYOUT, None, None, torch.tensor([0, row]))


def test_a_row_that_is_read_twice_is_given_twice(random: Callable[..., Tensor], used: list[int]) -> None:
    block, tokens, rows = random_block(), random(LAYOUT.total_tokens, DIM), torch.tensor([3, 0, 3])
    out = block(tokens, LAYOUT, None, None, rows)
    assert used == []
    torch.testing.assert_close(out, block(tokens, LAYOUT, None, None, rows[:2])[[0, 1, 0]])
    assert used == [2]


def test_parts_that_do_not_fit_are_refused() -> None:
    query, keys, starts, out = torch.zeros(5, 64), torch.zeros(20, 128), torch.tensor([0, 3, 5]), torch.zeros(5, 64)
    operations.attention_of(query, keys, starts, 2, fused.BY_FP32, 50, out)
    for wrong in ([0, 3, 6], [1, 3, 5], [0, 6, 5]):
        with pytest.raises(ValueError, match="do not fit"):
            operations.attention_of(query, keys, torch.tensor(wrong), 2, fused.BY_FP32, 50, out)
    with pytest.raises(ValueError, match="do not fit"):
        operations.attention_of(query, keys[:, :64].contiguous(), starts, 2, fused.BY_FP32, 50, out)
    with pytest.raises(ValueError, match="do not fit"):  # more queries of a sequence than it has tokens
        operations.attention_of(torch.zeros(11, 64), keys, torch.tensor([0, 11, 11]), 2, fused.BY_FP32, 110, out)
    with pytest.raises(ValueError, match="51 pairs"):
        operations.attention_of(query, keys, starts, 2, fused.BY_FP32, 51, out)
    with pytest.raises(TypeError, match="no attention"):
        operations.attention_of(query, keys, starts, 2, fused.BY_FP32, 50, out.bfloat16())
    with pytest.raises(TypeError, match="no attention"):
        operations.attention_of_backward(out.bfloat16(), query, keys, starts, 2, fused.BY_FP32, 50, out, keys.clone())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_reads_with_few_queries(precision: str, tmp_path: Path, used: list[int]) -> None:
    """FSDP casts what it finds in a unit's arguments: indices stay as they are."""
    sizes = {"model__dim": 64, "model__heads": 2, "model__depth": 2, "model__drop_path": 0.4}
    crops = {"crops__global_size": 64, "train__duration": "1it", "train__batch": 8, "train__microbatch": 8}
    train_alone(tiny_run(tmp_path / "run", train__precision=precision, **sizes, **crops))
    assert len(used) == 2  # teacher and student
    assert all(used)
