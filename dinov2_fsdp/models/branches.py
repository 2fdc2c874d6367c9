"""Whole branches of a block by compiled code, for a CPU with AVX-512: nothing is left between their matrix products.

Each thread takes a few rows through a whole branch (:mod:`dinov2_fsdp.native`, ``branch.cpp``), so that neither Python
nor memory nor the other threads are waited for between norm, products, activation and residual. The same mathematics
as :mod:`dinov2_fsdp.models.frugal` and :mod:`dinov2_fsdp.models.frugal_attention`, which run elsewhere, and with which
tests compare it. Sums over rows go from the first row to the last: results do not depend on the number of threads.

Tensors are fp32 or bf16. bf16 is multiplied by instructions for it where those are the faster ones, and as fp32 where
they are not (:func:`dinov2_fsdp.models.products.widens`); sums, norms and activations are in fp32.
"""

from __future__ import annotations

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
) -> Tensor:
    """Return ``second(GELU(first(norm(tokens)))) · gamma`` for ``(rows, dim)``, see :func:`frugal.feed_forward`.

    ``keep``: a backward pass may follow, and finds what it needs.
    """
    layers = (norm.weight, norm.bias, first.weight, first.bias, second.weight, second.bias, gamma)
    out: Tensor = _FeedForward.apply(tokens, *layers, norm.eps, onto, keep)
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
) -> Tensor:
    """Return ``proj(attention(qkv(norm(tokens)))) · gamma`` for packed ``(tokens, dim)``, likewise."""
    layers = (norm.weight, norm.bias, qkv.weight, qkv.bias, proj.weight, proj.bias, gamma)
    out: Tensor = _AttentionBranch.apply(tokens, *layers, layout, heads, norm.eps, onto, keep)
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
    ) -> Tensor:
        ctx.onto, ctx.how = onto, _how(tokens)
        parameters = (norm_weight, norm_bias, weight1, bias1, weight2, bias2, gamma)
        out, *kept = torch.ops.dinov2_fsdp.feed_forward(tokens, *parameters, eps, onto, keep, ctx.how)
        ctx.save_for_backward(tokens, norm_weight, norm_bias, weight1, weight2, bias2, gamma, *kept)
        return out

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = torch.ops.dinov2_fsdp.feed_forward_backward(grad.contiguous(), *ctx.saved_tensors, ctx.onto, ctx.how)
        return *(part if part.numel() else None for part in found), None, None, None


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
    ) -> Tensor:
        ctx.spans, ctx.onto, ctx.how = list(layout.spans()), onto, _how(tokens)
        qkv, mean, scale = torch.ops.dinov2_fsdp.norm_linear(
            tokens, norm_weight, norm_bias, weight1, bias1, eps, ctx.how
        )
        qkv, attended = qkv.unflatten(-1, (3, heads, -1)), torch.empty_like(tokens)
        for start, end, sequences, _ in ctx.spans:
            attention(qkv[start:end], sequences, ctx.how, attended[start:end])
        out: Tensor = torch.ops.dinov2_fsdp.scaled_linear(
            attended, weight2, bias2, gamma, tokens if onto else None, ctx.how
        )
        kept = (qkv, attended, mean, scale) if keep else ()
        ctx.save_for_backward(tokens, norm_weight, norm_bias, weight1, weight2, bias2, gamma, *kept)
        return out

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, norm_weight, norm_bias, weight1, weight2, bias2, gamma, *kept = ctx.saved_tensors
        qkv, attended, mean, scale = kept
        grad = grad.contiguous()
        of_attended, *of_second = torch.ops.dinov2_fsdp.scaled_linear_backward(
            grad, attended, weight2, bias2, gamma, ctx.how
        )
        of_qkv = torch.empty_like(qkv, dtype=multiplied(ctx.how))
        for start, end, sequences, _ in ctx.spans:
            attention_backward(of_attended[start:end], qkv[start:end], sequences, ctx.how, of_qkv[start:end])
        del of_attended
        of_first = torch.ops.dinov2_fsdp.norm_linear_backward(
            of_qkv.flatten(1), tokens, norm_weight, norm_bias, weight1, mean, scale, grad if ctx.onto else None, ctx.how
        )
        found = (*of_first, *of_second)
        return *(part if part.numel() else None for part in found), None, None, None, None, None


# Operations of torch's, for whatever looks at them: what they multiply is counted.


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
) -> list[Tensor]:
    (rows, dim), width = tokens.shape, len(weight1)
    out, (mean, scale) = torch.empty_like(tokens), fp32(2, rows)
    kept = tokens.new_empty((rows if keep else 0, width))
    small = [_wide(part) for part in (norm_weight, norm_bias, bias1, bias2, gamma)]
    norm, (of_first, of_second, factor) = [_at(part) for part in small[:2]], [_at(part) for part in small[2:]]
    loaded().feed_forward(
        *(how, tokens.data_ptr(), rows, dim, width, *norm, eps, weight1.data_ptr(), of_first),
        *(weight2.data_ptr(), of_second, factor, int(onto), out.data_ptr(), kept.data_ptr() if keep else None),
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
) -> list[Tensor]:
    grad, (rows, dim), width = _like(grad, tokens), tokens.shape, len(weight1)
    of_tokens, of_weight1, of_weight2 = torch.empty_like(tokens), torch.empty_like(weight1), torch.empty_like(weight2)
    of_norm_weight, of_norm_bias, of_bias2, of_gamma = (fp32(dim) for _ in range(4))
    of_bias1 = fp32(width)
    small = [_wide(part) for part in (norm_weight, norm_bias, bias2, gamma)]
    loaded().feed_forward_backward(
        *(how, grad.data_ptr(), tokens.data_ptr(), rows, dim, width, _at(small[0]), _at(small[1])),
        *(weight1.data_ptr(), weight2.data_ptr(), _at(small[2]), _at(small[3]), int(onto), kept.data_ptr()),
        *(mean.data_ptr(), scale.data_ptr(), of_tokens.data_ptr(), of_norm_weight.data_ptr()),
        *(of_norm_bias.data_ptr(), of_weight1.data_ptr(), of_bias1.data_ptr(), of_weight2.data_ptr()),
        *(of_bias2.data_ptr(), None if gamma is None else of_gamma.data_ptr()),
    )
    # In the order of a branch's arguments.
    found = (of_norm_weight, of_norm_bias, of_weight1, of_bias1, of_weight2, of_bias2)
    return [of_tokens, *(part.to(tokens.dtype) for part in found), _of_factor(of_gamma, gamma)]


def _norm_linear(
    tokens: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, eps: float, how: int
) -> list[Tensor]:
    (rows, dim), width = tokens.shape, len(weight)
    out, (mean, scale) = tokens.new_empty(rows, width), fp32(2, rows)
    small = [_wide(part) for part in (norm_weight, norm_bias, bias)]
    loaded().norm_linear(
        *(how, tokens.data_ptr(), rows, dim, _at(small[0]), _at(small[1]), eps, weight.data_ptr()),
        *(_at(small[2]), width, out.data_ptr(), mean.data_ptr(), scale.data_ptr()),
    )
    return [out, mean, scale]


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
) -> list[Tensor]:
    (rows, dim), width = tokens.shape, len(weight)
    of_tokens, of_weight, of_bias = torch.empty_like(tokens), torch.empty_like(weight), fp32(width)
    of_norm_weight, of_norm_bias = fp32(dim), fp32(dim)
    small = [_wide(part) for part in (norm_weight, norm_bias)]
    onto = None if onto is None else _like(onto, tokens)
    loaded().norm_linear_backward(
        *(how, grad.data_ptr(), tokens.data_ptr(), rows, dim, width, _at(small[0]), _at(small[1])),
        *(weight.data_ptr(), mean.data_ptr(), scale.data_ptr(), _at(onto), of_tokens.data_ptr()),
        *(of_norm_weight.data_ptr(), of_norm_bias.data_ptr(), of_weight.data_ptr(), of_bias.data_ptr()),
    )
    found = (of_norm_weight, of_norm_bias, of_weight, of_bias)
    return [of_tokens, *(part.to(tokens.dtype) for part in found)]


def _scaled_linear(
    rows: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor | None, onto: Tensor | None, how: int
) -> Tensor:
    out, small = rows.new_empty(len(rows), len(weight)), [_wide(bias), _wide(gamma)]
    loaded().scaled_linear(
        *(how, rows.data_ptr(), *rows.shape, weight.data_ptr(), _at(small[0]), _at(small[1]), len(weight)),
        *(_at(onto), out.data_ptr()),
    )
    return out


def _scaled_linear_backward(
    grad: Tensor, rows: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor | None, how: int
) -> list[Tensor]:
    grad, dim = _like(grad, rows), len(weight)
    of_rows, of_weight = torch.empty_like(rows, dtype=multiplied(how)), torch.empty_like(weight)
    of_bias, of_gamma = fp32(dim), fp32(dim)
    small = [_wide(bias), _wide(gamma)]
    loaded().scaled_linear_backward(
        *(how, grad.data_ptr(), rows.data_ptr(), *rows.shape, weight.data_ptr(), _at(small[0]), _at(small[1])),
        *(dim, of_rows.data_ptr(), of_weight.data_ptr(), of_bias.data_ptr()),
        None if gamma is None else of_gamma.data_ptr(),
    )
    return [of_rows, of_weight, of_bias.to(rows.dtype), _of_factor(of_gamma, gamma)]


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
for _schema, _function in {
    f"feed_forward(Tensor tokens, {_NORM}, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, Tensor? gamma, "
    "float eps, bool onto, bool keep, int how) -> Tensor[]": _feed_forward,
    f"feed_forward_backward(Tensor grad, Tensor tokens, {_NORM}, Tensor weight1, Tensor weight2, Tensor bias2, "
    "Tensor? gamma, Tensor kept, Tensor mean, Tensor scale, bool onto, int how) -> Tensor[]": _feed_forward_backward,
    f"norm_linear(Tensor tokens, {_NORM}, Tensor weight, Tensor bias, float eps, int how) -> Tensor[]": _norm_linear,
    f"norm_linear_backward(Tensor grad, Tensor tokens, {_NORM}, Tensor weight, Tensor mean, Tensor scale, "
    "Tensor? onto, int how) -> Tensor[]": _norm_linear_backward,
    "scaled_linear(Tensor rows, Tensor weight, Tensor bias, Tensor? gamma, Tensor? onto, "
    "int how) -> Tensor": _scaled_linear,
    "scaled_linear_backward(Tensor grad, Tensor rows, Tensor weight, Tensor bias, Tensor? gamma, "
    "int how) -> Tensor[]": _scaled_linear_backward,
}.items():
    _operations.define(_schema)
    _operations.impl(_schema.partition("(")[0], _function, "CPU")


def _flops(rows: tuple[int, ...], weight: tuple[int, ...]) -> int:
    return 2 * rows[0] * weight[0] * weight[1]


# The schemas' arguments, tensors as their shapes. Backward is twice as much.
@register_flop_formula(torch.ops.dinov2_fsdp.feed_forward)
def _(tokens: Any, norm_weight: Any, norm_bias: Any, weight1: Any, *_: Any, **__: Any) -> int:
    return 2 * _flops(tokens, weight1)


@register_flop_formula(torch.ops.dinov2_fsdp.feed_forward_backward)
def _(grad: Any, tokens: Any, norm_weight: Any, norm_bias: Any, weight1: Any, *_: Any, **__: Any) -> int:
    return 4 * _flops(tokens, weight1)


@register_flop_formula(torch.ops.dinov2_fsdp.norm_linear)
def _(tokens: Any, norm_weight: Any, norm_bias: Any, weight: Any, *_: Any, **__: Any) -> int:
    return _flops(tokens, weight)


@register_flop_formula(torch.ops.dinov2_fsdp.norm_linear_backward)
def _(grad: Any, tokens: Any, norm_weight: Any, norm_bias: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * _flops(tokens, weight)


@register_flop_formula(torch.ops.dinov2_fsdp.scaled_linear)
def _(rows: Any, weight: Any, *_: Any, **__: Any) -> int:
    return _flops(rows, weight)


@register_flop_formula(torch.ops.dinov2_fsdp.scaled_linear_backward)
def _(grad: Any, rows: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * _flops(rows, weight)
