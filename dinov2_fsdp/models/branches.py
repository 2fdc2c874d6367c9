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
from torch.utils.flop_counter import register_flop_formula

from dinov2_fsdp.models import products
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
    return loaded().has_branches and _how(tokens) is not None


def _how(tokens: Tensor) -> int | None:
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
    return None if how is None else _scaled_linear(rows, weight, fp32(len(weight)).zero_(), None, None, how)


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
    return _how(first) if fits and loaded().has_branches else None


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
        ctx.onto, ctx.how, ctx.chosen = onto, _how(tokens), chosen
        parameters = (norm_weight, norm_bias, weight1, bias1, weight2, bias2, gamma, eps, onto, keep, ctx.how)
        if chosen is None:
            out, *kept = torch.ops.dinov2_fsdp.feed_forward(tokens, *parameters)
        else:
            out = _place(ctx, tokens, chosen)
            tokens, *kept = torch.ops.dinov2_fsdp.feed_forward(tokens, *parameters, chosen.rows, chosen.factors, out)
        ctx.save_for_backward(tokens, norm_weight, norm_bias, weight1, weight2, bias2, gamma, *kept)
        return out

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors  # once: what is computed again for it is not there a second time
        grad = _like(grad, kept[0])
        rows, factors, of_all = _place_of_gradient(grad, ctx.chosen)
        of_tokens, *found = torch.ops.dinov2_fsdp.feed_forward_backward(
            grad, *kept, ctx.onto, ctx.how, rows, factors, of_all
        )
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
        ctx.spans, ctx.onto, ctx.how, ctx.chosen = list(layout.spans()), onto, _how(tokens), chosen
        rows = None if chosen is None else chosen.rows
        qkv, mean, scale, taken = torch.ops.dinov2_fsdp.norm_linear(
            tokens, norm_weight, norm_bias, weight1, bias1, eps, ctx.how, rows
        )
        read = tokens if chosen is None else taken
        qkv, attended = qkv.unflatten(-1, (3, heads, -1)), torch.empty_like(read)
        for start, end, sequences, _ in ctx.spans:
            attention(qkv[start:end], sequences, ctx.how, attended[start:end])
        second = (attended, weight2, bias2, gamma)
        if chosen is None:
            out: Tensor = torch.ops.dinov2_fsdp.scaled_linear(*second, tokens if onto else None, ctx.how)
        else:
            out = _place(ctx, tokens, chosen)
            torch.ops.dinov2_fsdp.scaled_linear_onto(*second, taken, ctx.how, chosen.rows, chosen.factors, out)
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
        of_attended, *of_second = torch.ops.dinov2_fsdp.scaled_linear_backward(
            grad, attended, weight2, bias2, gamma, ctx.how, rows, factors
        )
        of_qkv = torch.empty_like(qkv, dtype=multiplied(ctx.how))
        for start, end, sequences, _ in ctx.spans:
            attention_backward(of_attended[start:end], qkv[start:end], sequences, ctx.how, of_qkv[start:end])
        del of_attended
        onto = grad if ctx.onto else None
        of_tokens, *of_first = torch.ops.dinov2_fsdp.norm_linear_backward(
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


# Operations of torch's, for whatever looks at them: what they multiply is counted. With `rows` they read these of a
# longer matrix, and write these of `into`, times `factors`; the backward passes get the tokens that were read. `into`
# may be what is read, row by row: nothing may reorder them.


def _feed_forward(
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
    how: int,
    rows: Tensor | None = None,
    factors: Tensor | None = None,
    into: Tensor | None = None,
) -> list[Tensor]:
    """Return the result, or where it goes ``into`` something, the rows that were read; and what is kept."""
    count, (dim, width) = len(tokens if rows is None else rows), (tokens.shape[1], len(weight1))
    out, (mean, scale) = tokens.new_empty(count, dim), fp32(2, count)
    kept = tokens.new_empty((count if keep else 0, width))
    small = [_wide(part) for part in (norm_weight, norm_bias, bias1, bias2, gamma)]
    norm, (of_first, of_second, factor) = [_at(part) for part in small[:2]], [_at(part) for part in small[2:]]
    loaded().feed_forward(
        *(how, tokens.data_ptr(), _at(rows), _at(factors), None if rows is None else out.data_ptr(), count, dim),
        *(width, *norm, eps, weight1.data_ptr(), of_first, weight2.data_ptr(), of_second, factor, int(onto)),
        *((out if into is None else into).data_ptr(), kept.data_ptr() if keep else None),
        *(mean.data_ptr(), scale.data_ptr()),
    )
    return [out, kept, mean, scale]


def _feed_forward_backward(
    grad: Tensor,
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    gamma: Tensor | None,
    kept: Tensor,
    mean: Tensor,
    scale: Tensor,
    onto: bool,
    how: int,
    rows: Tensor | None = None,
    factors: Tensor | None = None,
    into: Tensor | None = None,
) -> list[Tensor]:
    (count, dim), width = tokens.shape, len(weight1)
    of_tokens, of_weight1, of_weight2 = _unless(into, tokens), torch.empty_like(weight1), torch.empty_like(weight2)
    of_norm_weight, of_norm_bias, of_bias2, of_gamma = (fp32(dim) for _ in range(4))
    of_bias1 = fp32(width)
    small = [_wide(part) for part in (norm_weight, norm_bias, bias2, gamma)]
    loaded().feed_forward_backward(
        *(how, grad.data_ptr(), _at(rows), _at(factors), tokens.data_ptr(), count, dim, width, _at(small[0])),
        *(_at(small[1]), weight1.data_ptr(), weight2.data_ptr(), _at(small[2]), _at(small[3]), int(onto)),
        *(kept.data_ptr(), mean.data_ptr(), scale.data_ptr(), (of_tokens if into is None else into).data_ptr()),
        of_norm_weight.data_ptr(),
        *(of_norm_bias.data_ptr(), of_weight1.data_ptr(), of_bias1.data_ptr(), of_weight2.data_ptr()),
        *(of_bias2.data_ptr(), None if gamma is None else of_gamma.data_ptr()),
    )
    # In the order of a branch's arguments.
    found = (of_norm_weight, of_norm_bias, of_weight1, of_bias1, of_weight2, of_bias2)
    return [of_tokens, *(part.to(tokens.dtype) for part in found), _of_factor(of_gamma, gamma)]


def _norm_linear(
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    how: int,
    rows: Tensor | None = None,
) -> list[Tensor]:
    """Return the result, mean and scale of each row, and the rows that were read, empty for all of them."""
    count, (dim, width) = len(tokens if rows is None else rows), (tokens.shape[1], len(weight))
    out, (mean, scale) = tokens.new_empty(count, width), fp32(2, count)
    taken = tokens.new_empty(0 if rows is None else count, dim)
    small = [_wide(part) for part in (norm_weight, norm_bias, bias)]
    loaded().norm_linear(
        *(how, tokens.data_ptr(), _at(rows), taken.data_ptr(), count, dim, _at(small[0]), _at(small[1]), eps),
        *(weight.data_ptr(), _at(small[2]), width, out.data_ptr(), mean.data_ptr(), scale.data_ptr()),
    )
    return [out, mean, scale, taken]


def _norm_linear_backward(
    grad: Tensor,
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    mean: Tensor,
    scale: Tensor,
    onto: Tensor | None,
    how: int,
    rows: Tensor | None = None,
    into: Tensor | None = None,
) -> list[Tensor]:
    (count, dim), width = tokens.shape, len(weight)
    of_tokens, of_weight, of_bias = _unless(into, tokens), torch.empty_like(weight), fp32(width)
    of_norm_weight, of_norm_bias = fp32(dim), fp32(dim)
    small = [_wide(part) for part in (norm_weight, norm_bias)]
    loaded().norm_linear_backward(
        *(how, grad.data_ptr(), tokens.data_ptr(), _at(rows), count, dim, width, _at(small[0]), _at(small[1])),
        *(weight.data_ptr(), mean.data_ptr(), scale.data_ptr(), _at(onto)),
        *((of_tokens if into is None else into).data_ptr(), of_norm_weight.data_ptr(), of_norm_bias.data_ptr()),
        *(of_weight.data_ptr(), of_bias.data_ptr()),
    )
    found = (of_norm_weight, of_norm_bias, of_weight, of_bias)
    return [of_tokens, *(part.to(tokens.dtype) for part in found)]


def _scaled_linear(
    rows: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor | None, onto: Tensor | None, how: int
) -> Tensor:
    out = rows.new_empty(len(rows), len(weight))
    _write_scaled_linear(rows, weight, bias, gamma, onto, how, None, None, out)
    return out


def _write_scaled_linear(
    taken: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor | None,
    onto: Tensor | None,
    how: int,
    rows: Tensor | None,
    factors: Tensor | None,
    into: Tensor,
) -> None:
    small = [_wide(bias), _wide(gamma)]
    loaded().scaled_linear(
        *(how, taken.data_ptr(), *taken.shape, weight.data_ptr(), _at(small[0]), _at(small[1]), len(weight)),
        *(_at(onto), _at(rows), _at(factors), into.data_ptr()),
    )


def _scaled_linear_backward(
    grad: Tensor,
    taken: Tensor,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor | None,
    how: int,
    rows: Tensor | None = None,
    factors: Tensor | None = None,
) -> list[Tensor]:
    dim = len(weight)
    of_taken, of_weight = torch.empty_like(taken, dtype=multiplied(how)), torch.empty_like(weight)
    of_bias, of_gamma = fp32(dim), fp32(dim)
    small = [_wide(bias), _wide(gamma)]
    loaded().scaled_linear_backward(
        *(how, grad.data_ptr(), _at(rows), _at(factors), taken.data_ptr(), *taken.shape, weight.data_ptr()),
        *(_at(small[0]), _at(small[1]), dim, of_taken.data_ptr(), of_weight.data_ptr(), of_bias.data_ptr()),
        None if gamma is None else of_gamma.data_ptr(),
    )
    return [of_taken, of_weight, of_bias.to(taken.dtype), _of_factor(of_gamma, gamma)]


def _unless(into: Tensor | None, like: Tensor) -> Tensor:
    """Return new memory, none if what would go there goes into something else."""
    return torch.empty_like(like) if into is None else like.new_empty(0)


def _wide(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.float()


def _at(part: Tensor | None) -> int | None:
    return None if part is None else part.data_ptr()


def _like(grad: Tensor, tokens: Tensor) -> Tensor:
    """Return a gradient in the type of what it belongs to: it may come from under an autocast."""
    return grad.to(tokens.dtype).contiguous()


def _of_factor(found: Tensor, gamma: Tensor | None) -> Tensor:
    """Return the gradient in LayerScale, empty without that."""
    return torch.empty(0) if gamma is None else found.to(gamma.dtype)


_operations = torch.library.Library("dinov2_fsdp", "FRAGMENT")
_NORM = "Tensor norm_weight, Tensor norm_bias"
_ROWS, _INTO = "Tensor? rows=None, Tensor? factors=None", "Tensor(a!)? into=None"
for _schema, _function in {
    f"feed_forward(Tensor tokens, {_NORM}, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, Tensor? gamma, "
    f"float eps, bool onto, bool keep, int how, {_ROWS}, {_INTO}) -> Tensor[]": _feed_forward,
    f"feed_forward_backward(Tensor grad, Tensor tokens, {_NORM}, Tensor weight1, Tensor weight2, Tensor bias2, "
    "Tensor? gamma, Tensor kept, Tensor mean, Tensor scale, bool onto, int how, "
    f"{_ROWS}, {_INTO}) -> Tensor[]": _feed_forward_backward,
    f"norm_linear(Tensor tokens, {_NORM}, Tensor weight, Tensor bias, float eps, int how, "
    "Tensor? rows=None) -> Tensor[]": _norm_linear,
    f"norm_linear_backward(Tensor grad, Tensor tokens, {_NORM}, Tensor weight, Tensor mean, Tensor scale, "
    f"Tensor? onto, int how, Tensor? rows=None, {_INTO}) -> Tensor[]": _norm_linear_backward,
    "scaled_linear(Tensor rows, Tensor weight, Tensor bias, Tensor? gamma, Tensor? onto, "
    "int how) -> Tensor": _scaled_linear,
    "scaled_linear_onto(Tensor taken, Tensor weight, Tensor bias, Tensor? gamma, Tensor onto, int how, Tensor rows, "
    "Tensor factors, Tensor(a!) into) -> ()": _write_scaled_linear,
    "scaled_linear_backward(Tensor grad, Tensor taken, Tensor weight, Tensor bias, Tensor? gamma, "
    f"int how, {_ROWS}) -> Tensor[]": _scaled_linear_backward,
}.items():
    _operations.define(_schema)
    _operations.impl(_schema.partition("(")[0], _function, "CPU")


def _flops(rows: tuple[int, ...], weight: tuple[int, ...]) -> int:
    return 2 * rows[0] * weight[0] * weight[1]


# The schemas' arguments, tensors as their shapes. Backward is twice as much.
@register_flop_formula(torch.ops.dinov2_fsdp.feed_forward)
def _(
    tokens: Any,
    norm_weight: Any,
    norm_bias: Any,
    weight1: Any,
    bias1: Any,
    weight2: Any,
    bias2: Any,
    gamma: Any,
    eps: Any,
    onto: Any,
    keep: Any,
    how: Any,
    rows: Any = None,
    *_: Any,
    **__: Any,
) -> int:
    return 2 * _flops(rows or tokens, weight1)


@register_flop_formula(torch.ops.dinov2_fsdp.feed_forward_backward)
def _(grad: Any, tokens: Any, norm_weight: Any, norm_bias: Any, weight1: Any, *_: Any, **__: Any) -> int:
    return 4 * _flops(tokens, weight1)


@register_flop_formula(torch.ops.dinov2_fsdp.norm_linear)
def _(
    tokens: Any,
    norm_weight: Any,
    norm_bias: Any,
    weight: Any,
    bias: Any,
    eps: Any,
    how: Any,
    rows: Any = None,
    **__: Any,
) -> int:
    return _flops(rows or tokens, weight)


@register_flop_formula(torch.ops.dinov2_fsdp.norm_linear_backward)
def _(grad: Any, tokens: Any, norm_weight: Any, norm_bias: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * _flops(tokens, weight)


@register_flop_formula([torch.ops.dinov2_fsdp.scaled_linear, torch.ops.dinov2_fsdp.scaled_linear_onto])
def _(taken: Any, weight: Any, *_: Any, **__: Any) -> int:
    return _flops(taken, weight)


@register_flop_formula(torch.ops.dinov2_fsdp.scaled_linear_backward)
def _(grad: Any, taken: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * _flops(taken, weight)
