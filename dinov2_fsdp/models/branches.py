"""Whole branches of a block by compiled code, for a CPU with AVX-512: nothing is left between their matrix products.

Each thread takes a few rows through a whole branch (:mod:`dinov2_fsdp.native`, ``branch.cpp``), so that neither Python
nor memory nor the other threads are waited for between norm, products, activation and residual. The same mathematics
as :mod:`dinov2_fsdp.models.frugal` and :mod:`dinov2_fsdp.models.frugal_attention`, which run elsewhere, and with which
tests compare it. Sums over rows go from the first row to the last: results do not depend on the number of threads.

With stochastic depth a branch reads the rows that it keeps where they lie, and is added to them there, not by passes
over memory of their own (:class:`Chosen`). What was read is copied on the way, for the backward pass.

Tensors are fp32 or bf16. bf16 is multiplied by instructions for it where those are the faster ones, and as fp32 where
they are not (:func:`dinov2_fsdp.models.products.widens`); sums, norms and activations are in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dinov2_fsdp.models import products
from dinov2_fsdp.models.branch_operations import operations
from dinov2_fsdp.models.fused import (
    BY_BF16,
    BY_FP32,
    WIDENED,
    are_rows,
    attention,
    attention_backward,
    compiled,
    fp32,
    loaded,
    multiplied,
)
from dinov2_fsdp.models.layout import Layout
from dinov2_fsdp.models.products import outside_autocast

COLUMNS = 32
"""Matrices are multiplied by so many columns at a time: they have a multiple of it."""


@dataclass(frozen=True)
class Chosen:
    """The rows of the tokens that a branch runs on, and to which it is added.

    Of a block's two branches, the second overwrites the tokens, and the first, on the way back, their gradient: nobody
    else has what stands between the two. What goes into a block and comes out of it others may have.

    Attributes:
        rows: ``(kept,)`` int64, distinct.
        factors: ``(kept, 1)`` fp32, what their results are multiplied by.
        second: whether the branch is a block's second one.
    """

    rows: Tensor
    factors: Tensor
    second: bool

    def fit(self, tokens: Tensor) -> bool:
        """Return whether compiled code can follow them."""
        plain = (
            self.factors.dtype == torch.float32 and self.factors.is_contiguous() and self.factors.device.type == "cpu"
        )
        return plain and self.factors.numel() == len(self.rows) and are_rows(self.rows, tokens)


def applies(tokens: Tensor, first: nn.Linear, second: nn.Linear, also: tuple[Tensor, ...] = (), parts: int = 1) -> bool:
    """Return whether a branch with these linear layers, which have biases, can be had for ``(rows, dim)`` here.

    Whether types agree and what is trained is asked elsewhere (:func:`dinov2_fsdp.models.frugal.applies`).

    Args:
        also: the other parameters, each ``(dim,)``.
        parts: so many times as much as the second layer takes does the first give.
    """
    layers = (first, second)
    weights = [layer.weight for layer in layers]
    if any(layer.bias is None for layer in layers) or any(size % COLUMNS for w in weights for size in w.shape):
        return False
    # What does not fit together is for torch to refuse.
    wide, between = len(first.weight), second.weight.shape[1]
    dim, shapes = tokens.shape[-1], [(wide, tokens.shape[-1]), (tokens.shape[-1], between)]
    if tokens.dim() != 2 or wide != parts * between or [weight.shape for weight in weights] != shapes:
        return False
    if any(some.shape != (dim,) for some in (*also, second.bias)) or first.bias.shape != (wide,):
        return False
    # In the tokens' type, plain, one after the other in memory.
    if not compiled(tokens, *weights, *also, first.bias, second.bias):
        return False
    return loaded().has_branches and how_multiplied(tokens) is not None


def how_multiplied(tokens: Tensor) -> int | None:
    """Return how these are multiplied; None where libraries have instructions that compiled code does not use."""
    if tokens.dtype == torch.float32:
        return BY_FP32
    if products.widens(tokens):
        return WIDENED
    library = loaded()
    # One maker's vector instructions for bf16 are slow, and its tiles fast.
    ours = library.has_tiles or (library.multiplies_bf16 and products.processor_maker() != "GenuineIntel")
    return BY_BF16 if ours else None


def feed_forward(
    tokens: Tensor,
    norm: nn.LayerNorm,
    first: nn.Linear,
    second: nn.Linear,
    gamma: Tensor | None,
    onto: bool,
    keep: bool,
    chosen: Chosen | None = None,
) -> Tensor:
    """Return ``second(GELU(first(norm(tokens)))) · gamma`` for ``(rows, dim)``, see :func:`frugal.feed_forward`.

    Args:
        keep: a backward pass may follow, and finds what it needs.
        chosen: the branch runs on these rows, and is added to them; the others are returned as they are.
    """
    layers = (norm.weight, norm.bias, first.weight, first.bias, second.weight, second.bias, gamma)
    out: Tensor = _FeedForward.apply(tokens, *layers, norm.eps, onto, keep, chosen)
    return out


def attention_branch(
    tokens: Tensor,
    layout: Layout,
    heads: int,
    norm: nn.LayerNorm,
    qkv: nn.Linear,
    proj: nn.Linear,
    gamma: Tensor | None,
    onto: bool,
    keep: bool,
    chosen: Chosen | None = None,
) -> Tensor:
    """Return ``proj(attention(qkv(norm(tokens)))) · gamma`` for packed ``(tokens, dim)``, likewise.

    ``layout``: that of the chosen rows, if some are.
    """
    layers = (norm.weight, norm.bias, qkv.weight, qkv.bias, proj.weight, proj.bias, gamma)
    out: Tensor = _AttentionBranch.apply(tokens, *layers, layout, heads, norm.eps, onto, keep, chosen)
    return out


def product(rows: Tensor, weight: Tensor) -> Tensor | None:
    """Return ``rows · weightᵀ`` for ``(rows, in)`` and ``(out, in)`` as branches multiply; None where they cannot.

    The product alone: it is what benchmarks measure a branch against.
    """
    how = _how_alone(rows, weight, same=1, also=weight.shape)
    if how is None:
        return None
    out: Tensor = operations.scaled_linear(rows, weight, fp32(len(weight)).zero_(), None, None, how)
    return out


def product_of_rows(left: Tensor, right: Tensor) -> Tensor | None:
    """Return ``leftᵀ · right`` for ``(rows, m)`` and ``(rows, n)``, likewise."""
    how = _how_alone(left, right, same=0, also=right.shape[1:])
    if how is None:
        return None
    out, sizes = left.new_empty(left.shape[1], right.shape[1]), (len(left), left.shape[1], right.shape[1])
    loaded().product_of_rows(how, left.data_ptr(), right.data_ptr(), *sizes, out.data_ptr())
    return out


def _how_alone(*matrices: Tensor, same: int, also: torch.Size) -> int | None:
    first, second = matrices
    if first.dim() != 2 or second.dim() != 2 or first.shape[same] != second.shape[same]:
        return None
    fits = not any(size % COLUMNS for size in also) and compiled(first, second)
    return how_multiplied(first) if fits and loaded().has_branches else None


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
        gamma: Tensor | None,
        eps: float,
        onto: bool,
        keep: bool,
        chosen: Chosen | None,
    ) -> Tensor:
        ctx.onto, ctx.how, ctx.chosen = onto, how_multiplied(tokens), chosen
        parameters = (norm_weight, norm_bias, weight1, bias1, weight2, bias2, gamma, eps, onto, keep, ctx.how)
        if chosen is None:
            out, *kept = operations.feed_forward(tokens, *parameters)
        else:
            out = _place(ctx, tokens, chosen)
            tokens, *kept = operations.feed_forward(tokens, *parameters, chosen.rows, chosen.factors, out)
        ctx.save_for_backward(tokens, norm_weight, norm_bias, weight1, weight2, bias2, gamma, *kept)
        return out

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors  # once: what is computed again for it is not there a second time
        grad = _like(grad, kept[0])
        rows, factors, of_all = _place_of_gradient(grad, ctx.chosen)
        of_tokens, *found = operations.feed_forward_backward(grad, *kept, ctx.onto, ctx.how, rows, factors, of_all)
        found = [of_tokens if of_all is None else of_all, *found]
        return *(part if part.numel() else None for part in found), None, None, None, None


class _AttentionBranch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        weight2: Tensor,
        bias2: Tensor,
        gamma: Tensor | None,
        layout: Layout,
        heads: int,
        eps: float,
        onto: bool,
        keep: bool,
        chosen: Chosen | None,
    ) -> Tensor:
        ctx.spans, ctx.onto, ctx.how, ctx.chosen = list(layout.spans()), onto, how_multiplied(tokens), chosen
        rows = None if chosen is None else chosen.rows
        qkv, mean, scale, taken = operations.norm_linear(
            tokens, norm_weight, norm_bias, weight1, bias1, eps, ctx.how, rows
        )
        read = tokens if chosen is None else taken
        qkv, attended = qkv.unflatten(-1, (3, heads, -1)), torch.empty_like(read)
        for start, end, sequences, _ in ctx.spans:
            attention(qkv[start:end], sequences, ctx.how, attended[start:end])
        second = (attended, weight2, bias2, gamma)
        if chosen is None:
            out: Tensor = operations.scaled_linear(*second, tokens if onto else None, ctx.how)
        else:
            out = _place(ctx, tokens, chosen)
            operations.scaled_linear_onto(*second, taken, ctx.how, chosen.rows, chosen.factors, out)
        kept = (qkv, attended, mean, scale) if keep else ()
        ctx.save_for_backward(read, norm_weight, norm_bias, weight1, weight2, bias2, gamma, *kept)
        return out

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, norm_weight, norm_bias, weight1, weight2, bias2, gamma, *kept = ctx.saved_tensors
        qkv, attended, mean, scale = kept
        grad = _like(grad, tokens)
        rows, factors, of_all = _place_of_gradient(grad, ctx.chosen)
        of_attended, *of_second = operations.scaled_linear_backward(
            grad, attended, weight2, bias2, gamma, ctx.how, rows, factors
        )
        of_qkv = torch.empty_like(qkv, dtype=multiplied(ctx.how))
        for start, end, sequences, _ in ctx.spans:
            attention_backward(of_attended[start:end], qkv[start:end], sequences, ctx.how, of_qkv[start:end])
        del of_attended
        onto = grad if ctx.onto else None
        of_tokens, *of_first = operations.norm_linear_backward(
            of_qkv.flatten(1), tokens, norm_weight, norm_bias, weight1, mean, scale, onto, ctx.how, rows, of_all
        )
        found = (of_tokens if of_all is None else of_all, *of_first, *of_second)
        return *(part if part.numel() else None for part in found), None, None, None, None, None, None


def _place(ctx: Any, tokens: Tensor, chosen: Chosen) -> Tensor:
    """Return where a branch's result goes, the rows that are not chosen in place already."""
    if chosen.second:
        ctx.mark_dirty(tokens)
        return tokens
    return _others(tokens, chosen)


def _place_of_gradient(grad: Tensor, chosen: Chosen | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the chosen rows, their factors, and where the gradient in all rows goes: None for a new place."""
    if chosen is None:
        return None, None, None
    return chosen.rows, chosen.factors, _others(grad, chosen) if chosen.second else grad


def _others(matrix: Tensor, chosen: Chosen) -> Tensor:
    """Return a matrix in which the rows that are not chosen are those of another, and the chosen ones anything."""
    out, rows = torch.empty_like(matrix), chosen.rows
    half = int(matrix.dtype == torch.bfloat16)
    loaded().copy_others(half, matrix.data_ptr(), *matrix.shape, rows.data_ptr(), len(rows), out.data_ptr())
    return out


def _like(grad: Tensor, tokens: Tensor) -> Tensor:
    """Return a gradient in the type of what it belongs to: it may come from under an autocast."""
    return grad.to(tokens.dtype).contiguous()
