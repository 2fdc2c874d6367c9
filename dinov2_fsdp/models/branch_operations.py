"""Compiled branches as operations of torch's, for whatever looks at them: what they multiply is counted.

:mod:`dinov2_fsdp.models.branches` puts branches with gradients together from them. With ``rows`` they read these of a
longer matrix, and write these of ``into``, times ``factors``; the backward passes get the tokens that were read.
``into`` may be what is read, row by row: nothing may reorder them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dinov2_fsdp.models.fused import fp32, loaded, multiplied

operations = torch.ops.dinov2_fsdp
"""Where they are found."""


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
    taken: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor | None, onto: Tensor | None, how: int
) -> Tensor:
    out = taken.new_empty(len(taken), len(weight))
    _write_scaled_linear(taken, weight, bias, gamma, onto, how, None, None, out)
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
    "scaled_linear(Tensor taken, Tensor weight, Tensor bias, Tensor? gamma, Tensor? onto, "
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
@register_flop_formula(operations.feed_forward)
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


@register_flop_formula(operations.feed_forward_backward)
def _(grad: Any, tokens: Any, norm_weight: Any, norm_bias: Any, weight1: Any, *_: Any, **__: Any) -> int:
    return 4 * _flops(tokens, weight1)


@register_flop_formula(operations.norm_linear)
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


@register_flop_formula(operations.norm_linear_backward)
def _(grad: Any, tokens: Any, norm_weight: Any, norm_bias: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * _flops(tokens, weight)


@register_flop_formula([operations.scaled_linear, operations.scaled_linear_onto])
def _(taken: Any, weight: Any, *_: Any, **__: Any) -> int:
    return _flops(taken, weight)


@register_flop_formula(operations.scaled_linear_backward)
def _(grad: Any, taken: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * _flops(taken, weight)
