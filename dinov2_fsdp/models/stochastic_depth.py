"""Stochastic depth that skips work: each residual branch runs on a random subset of the sequences.

A branch that keeps ``k`` of a group's ``b`` sequences computes those alone and adds them back scaled by ``b/k``
(DINOv2, arXiv 2304.07193, section 5, "efficient stochastic depth"). The subsets of all branches are drawn ahead,
as plain indices: the model holds no randomness, so recomputation in the backward pass, compilation and the
number of ranks cannot change what is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2_fsdp.models.fused import add_to_rows, take_rows
from dinov2_fsdp.models.layout import Layout


@dataclass(frozen=True)
class Subset:
    """The sequences that one branch keeps: their packed ``layout``, token ``rows`` and ``scale``.

    ``rows``: ``(kept_tokens,)`` int64, rows of the full packed tensor. ``scale_bits``: :attr:`scale`, as integers.
    """

    layout: Layout
    rows: Tensor
    scale_bits: Tensor

    @property
    def scale(self) -> Tensor:
        """``(kept_tokens, 1)`` float32, what each token's result is multiplied by."""
        return self.scale_bits.view(torch.float32)


@dataclass(frozen=True)
class DepthPlan:
    """Subsets of all ``2 · depth`` branches: attention of block 0, feed-forward of block 0, attention of block 1, …

    ``rows``: ``(2 · depth, kept_tokens)`` int64. Every branch keeps as many sequences of each group as the others.
    ``scale_bits``: the bits of ``(kept_tokens, 1)`` float32 as int32. As numbers FSDP would round them: it casts all
    that a unit is given, and looks into dataclasses too.
    """

    layout: Layout
    rows: Tensor
    scale_bits: Tensor

    @property
    def scale(self) -> Tensor:
        """``(kept_tokens, 1)`` float32, what each token's result is multiplied by."""
        return self.scale_bits.view(torch.float32)

    def subset(self, branch: int) -> Subset:
        return Subset(self.layout, self.rows[branch], self.scale_bits)

    def to(self, device: torch.device) -> DepthPlan:
        rows, bits = (tensor.to(device, non_blocking=True) for tensor in (self.rows, self.scale_bits))
        return DepthPlan(self.layout, rows, bits)


def kept_sequences(sequences: int, drop: float) -> int:
    """Return how many of ``sequences`` a branch keeps: max(1, ⌊b·(1 − p)⌋)."""
    return max(1, int(sequences * (1 - drop)))


def draw_plan(layout: Layout, depth: int, drop: float, rng: np.random.Generator) -> DepthPlan | None:
    """Return the subsets of one forward pass, or None when nothing is dropped."""
    kept = Layout(tuple((kept_sequences(sequences, drop), length) for sequences, length in layout.groups))
    if kept == layout:
        return None
    rows, scales = [], []
    for (start, _, sequences, length), (keep, _) in zip(layout.spans(), kept.groups, strict=True):
        order = rng.random((2 * depth, sequences)).argsort(axis=1)[:, :keep]
        order.sort(axis=1)  # ascending rows read memory in order
        tokens = start + order[:, :, None] * length + np.arange(length)
        rows.append(tokens.reshape(2 * depth, keep * length))
        scales.append(np.full(keep * length, sequences / keep, dtype=np.float32))
    scale_bits = np.concatenate(scales).view(np.int32)
    return DepthPlan(kept, torch.from_numpy(np.concatenate(rows, axis=1)), torch.from_numpy(scale_bits)[:, None])


def add_residual(
    tokens: Tensor,
    layout: Layout,
    branch: Callable[[Tensor, Layout, bool], Tensor],
    subset: Subset | None,
    at_once: Callable[[Tensor, Subset], Tensor | None] | None = None,
) -> Tensor:
    """Return ``tokens + branch(tokens)``, the branch computed and scaled on ``subset`` alone if there is one.

    Args:
        branch: ``branch(tokens, layout, onto)`` adds what it returns to its tokens itself, if ``onto``.
        at_once: ``at_once(tokens, subset)`` does all of this, or returns None where it cannot.
    """
    if subset is None:
        return branch(tokens, layout, True)
    compiling = torch.compiler.is_compiling()
    if at_once is not None and not compiling and (done := at_once(tokens, subset)) is not None:
        return done
    if compiling:  # which does not follow the way of the gradient below
        kept = tokens.index_select(0, subset.rows)
    else:
        kept, tokens = _TakeRows.apply(tokens, subset.rows)
    residual = branch(kept, subset.layout, False)
    out: Tensor = _AddToRows.apply(tokens, residual, subset.rows, subset.scale.to(residual.dtype))
    return out


def add_residual_to(
    chosen: Tensor,
    rows: Tensor,
    layout: Layout,
    branch: Callable[[Tensor, Layout, bool], Tensor],
    subset: Subset | None,
) -> Tensor:
    """Return the rows ``rows`` of what :func:`add_residual` gives, for a branch that acts on each row by itself.

    The branch runs on these rows, also on those whose sequence it has dropped: how many that are, only the device
    knows.

    Args:
        chosen: ``(chosen, dim)``, these rows of the tokens.
    """
    if subset is None:
        return branch(chosen, layout, True)
    residual = branch(chosen, layout, False)
    scale = residual.new_zeros(layout.total_tokens, 1).index_copy(0, subset.rows, subset.scale.to(residual.dtype))
    return torch.addcmul(chosen, residual, scale.index_select(0, rows))


class _TakeRows(torch.autograd.Function):
    """A matrix's rows, and the matrix itself for what goes past them: their gradients meet in one pass over memory.

    Autograd's own way fills a matrix with zeros, adds the rows' gradients to that and the sum to the other gradient.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows)
        return take_rows(tokens, rows), tokens.view_as(tokens)

    @staticmethod
    def backward(ctx: Any, of_rows: Tensor, of_all: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return add_to_rows(of_all, rows, of_rows), None


class _AddToRows(torch.autograd.Function):
    """``tokens`` with ``residual · scale`` added to their ``rows``; autograd's own ways would keep the sums."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, residual: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(rows, scale)
        return add_to_rows(tokens, rows, residual, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, scale = ctx.saved_tensors
        return grad, take_rows(grad, rows, scale), None, None
