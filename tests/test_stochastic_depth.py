from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from tiny import tiny_backbone, tiny_images
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dinov2_fsdp import native
from dinov2_fsdp.models.fused import add_to_rows, take_rows
from dinov2_fsdp.models.layout import Layout
from dinov2_fsdp.models.stochastic_depth import DepthPlan, add_residual, draw_plan, kept_sequences


@pytest.mark.parametrize(
    ("sequences", "drop", "kept"), [(10, 0.3, 7), (7, 0.3, 4), (3, 0.4, 1), (2, 0.9, 1), (8, 0.0, 8)]
)
def test_a_branch_keeps_the_published_number_of_sequences(sequences: int, drop: float, kept: int) -> None:
    assert kept_sequences(sequences, drop) == kept


def test_every_crop_size_loses_its_own_share() -> None:
    plan = draw_plan(Layout(((10, 3), (20, 2))), 4, 0.3, np.random.default_rng(0))
    assert plan is not None
    assert plan.layout.groups == ((7, 3), (14, 2))
    assert plan.rows.shape == (8, 7 * 3 + 14 * 2)
    for rows in plan.rows:
        assert len(rows.unique()) == len(rows)
        assert (rows[:21] < 30).all()
        assert ((rows[21:] >= 30) & (rows[21:] < 70)).all()
        for tokens in rows[:21].reshape(7, 3):  # whole sequences, their tokens in order
            assert tokens[0] % 3 == 0
            assert torch.equal(tokens, tokens[0] + torch.arange(3))


def test_a_kept_branch_is_scaled_by_what_was_dropped_and_the_others_pass_unchanged() -> None:
    layout = Layout(((5, 2), (4, 1)))
    plan = draw_plan(layout, 1, 0.4, np.random.default_rng(0))
    assert plan is not None
    tokens, branch = torch.randn(14, 6), nn.Linear(6, 6)
    out = add_residual(tokens, layout, lambda x, *_: branch(x), plan.subset(0))
    expected, kept = tokens.clone(), set(plan.rows[0].tolist())
    for row in kept:
        expected[row] += branch(tokens[row]) * (5 / 3 if row < 10 else 4 / 2)
    torch.testing.assert_close(out, expected)
    dropped = sorted(set(range(14)) - kept)
    assert torch.equal(out[dropped], tokens[dropped])


def test_on_average_over_draws_nothing_is_dropped() -> None:
    layout, draws = Layout(((6, 2), (5, 3))), 1000
    tokens = torch.ones(layout.total_tokens, 1)
    rng, total = np.random.default_rng(0), torch.zeros(layout.total_tokens, 1)
    for _ in range(draws):
        plan = draw_plan(layout, 1, 0.4, rng)
        assert plan is not None
        total += add_residual(tokens, layout, lambda x, *_: 3 * x, plan.subset(1)) / draws
    torch.testing.assert_close(total, torch.full_like(total, 4.0), rtol=0.08, atol=0)


def test_gradients_of_dropped_branches_are_scaled_as_their_values() -> None:
    layout = Layout(((4, 2),))
    plan = draw_plan(layout, 1, 0.5, np.random.default_rng(0))
    assert plan is not None
    tokens = torch.randn(8, 3, requires_grad=True)
    add_residual(tokens, layout, lambda x, *_: 5 * x, plan.subset(0)).sum().backward()
    expected = torch.ones(8, 3)
    expected[plan.rows[0]] += 5 * 2.0
    assert tokens.grad is not None
    torch.testing.assert_close(tokens.grad, expected)


def test_without_drop_there_is_no_plan() -> None:
    assert draw_plan(Layout(((8, 3), (4, 2))), 2, 0.0, np.random.default_rng(0)) is None


def test_a_plan_is_a_function_of_its_generator() -> None:
    layout = Layout(((8, 3), (6, 2)))
    first, again, other = (draw_plan(layout, 3, 0.5, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first is not None
    assert again is not None
    assert other is not None
    assert torch.equal(first.rows, again.rows)
    assert not torch.equal(first.rows, other.rows)
    assert not torch.equal(first.rows[0], first.rows[1])


def test_dropped_branches_cost_nothing() -> None:
    # In float64, whose products torch's counter knows all.
    model, images = tiny_backbone().double(), tiny_images(10).double()

    def block_flops(drop: float) -> int:
        tokens, layout = model.embed(images).flatten(0, 1).detach(), model.layout([(10, 16, 16)])
        plan = draw_plan(layout, 2, drop, np.random.default_rng(0))
        with FlopCounterMode(display=False) as counter:
            for index, block in enumerate(model.blocks):
                subsets = (plan.subset(2 * index), plan.subset(2 * index + 1)) if plan is not None else (None, None)
                block(tokens.requires_grad_(), layout, *subsets).sum().backward()
        return counter.get_total_flops()

    whole = block_flops(0.0)
    assert whole > 0
    assert block_flops(0.4) == whole * 6 // 10
    assert block_flops(0.3) == whole * 7 // 10


def test_all_sequences_kept_equals_no_plan() -> None:
    model, layout = tiny_backbone(), Layout(((3, 17),))
    everything = DepthPlan(layout, torch.arange(51).expand(4, -1), torch.ones(51, 1).view(torch.int32))
    with_plan, _ = model.forward_packed([tiny_images(3)], [None], everything)
    without, _ = model.forward_packed([tiny_images(3)], [None])
    torch.testing.assert_close(with_plan, without)


@pytest.mark.parametrize("drop", [0.0, 0.5])
@pytest.mark.parametrize("backend", ["math", "sdpa"])
def test_chosen_rows_are_those_of_the_whole_with_its_gradients(drop: float, backend: str) -> None:
    """Of the last block's feed-forward branch nothing else is computed."""
    torch.manual_seed(0)
    model = tiny_backbone().double()
    model.set_attention_backend(backend)
    for name, parameter in model.named_parameters():
        torch.nn.init.uniform_(parameter, 0.5, 1.5) if "gamma" in name else None
    crops = [tiny_images(4).double(), tiny_images(2).double()[:, :, :8, :8]]
    layout = model.layout_of(crops)
    plan = draw_plan(layout, len(model.blocks), drop, np.random.default_rng(0))
    assert (plan is None) == (drop == 0)
    rows = torch.tensor([0, 17, 20, 34, 51, 52, 67, 68, layout.total_tokens - 1])
    weights = torch.randn(len(rows), model.embed_dim, dtype=torch.float64)
    found = []
    for chosen in (True, False):
        out, _ = model.forward_packed(crops, [None, None], plan, rows if chosen else None)
        out = out if chosen else out.index_select(0, rows)
        gradients = torch.autograd.grad((out * weights).sum(), list(model.blocks.parameters()))
        found.append([out.detach(), *gradients])
    for mine, whole in zip(*found, strict=True):
        torch.testing.assert_close(mine, whole, rtol=1e-10, atol=1e-10)


def test_the_last_feed_forward_branch_sees_the_rows_that_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny_backbone(), []
    for block in model.blocks:
        branch = block._ffn_branch  # type: ignore[operator, union-attr]
        monkeypatch.setattr(block, "_ffn_branch", lambda x, *others, b=branch: seen.append(len(x)) or b(x, *others))
    model.forward_packed([tiny_images(3)], [None], rows=torch.tensor([0, 5, 40]))
    assert seen == [51] * (len(model.blocks) - 1) + [3]


def test_the_gradient_is_that_of_finite_differences() -> None:
    layout = Layout(((4, 2),))
    plan = draw_plan(layout, 1, 0.5, np.random.default_rng(0))
    assert plan is not None
    weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)

    def run(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return add_residual(tokens, layout, lambda kept, *_: (kept @ weight).sin(), plan.subset(0))

    tokens = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (tokens, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 33, 384])
def test_large_branches_are_added_as_row_by_row(dtype: torch.dtype, dim: int) -> None:
    """Enough rows for compiled code, which rounds once; without it, too."""
    layout = Layout(((40, 130), (9, 7)))
    plan = draw_plan(layout, 1, 0.4, np.random.default_rng(0))
    assert plan is not None
    torch.manual_seed(0)
    given, upstream = torch.randn(layout.total_tokens, dim), torch.randn(layout.total_tokens, dim)
    weight = torch.randn(dim)
    found = []
    for switch in (nullcontext, native.switched_off):
        with switch():
            tokens = given.to(dtype, copy=True).requires_grad_()
            out = add_residual(tokens, layout, lambda x, *_: x * weight.to(dtype), plan.subset(0))
            out.backward(upstream.to(dtype))
            assert tokens.grad is not None
            found.append((out.detach(), tokens.grad))
    scale = torch.zeros(layout.total_tokens, 1).index_copy(0, plan.rows[0], plan.scale.to(dtype).float())
    factor = 1 + scale * weight.to(dtype).float()
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 4e-2}
    for out, grad in found:
        torch.testing.assert_close(out.float(), given.to(dtype).float() * factor, **tolerance)
        torch.testing.assert_close(grad.float(), upstream.to(dtype).float() * factor, **tolerance)
        dropped = (scale == 0).flatten()
        assert torch.equal(out[dropped], given.to(dtype)[dropped])
        assert torch.equal(grad[dropped], upstream.to(dtype)[dropped])


def test_rows_that_are_not_there_are_refused_and_no_memory_is_read() -> None:
    tokens = torch.randn(100, 384)
    for row in (-1, 100):
        rows = torch.tensor([0, row])
        with pytest.raises(IndexError):
            take_rows(tokens, rows)
        with pytest.raises((IndexError, RuntimeError)):
            add_to_rows(tokens, rows, torch.ones(2, 384))


def test_a_gradient_that_somebody_else_holds_is_left_as_it_was() -> None:
    layout = Layout(((64, 20),))
    plan = draw_plan(layout, 1, 0.5, np.random.default_rng(0))
    assert plan is not None
    tokens, upstream = torch.randn(1280, 64, requires_grad=True), torch.randn(1280, 64)
    before = upstream.clone()
    add_residual(tokens, layout, lambda x, *_: 2 * x, plan.subset(0)).backward(upstream)
    assert torch.equal(upstream, before)
