"""Linear layers with what stands around them, keeping less for the backward pass than autograd would.

Between two linear layers of a block stand cheap operations: layer norm, GELU or gate, LayerScale. Autograd keeps the
output of each; here they are computed again in the backward pass, from inputs that are kept anyway. Of what the blocks
of a plain ViT keep, that saves more than a third (docs/performance.md).

On a CPU a feed-forward branch goes through its rows in parts, forward and backward, so that what lies between its ends
stays in the cache: the wide tensors never stand in memory as a whole, but for the kept one. Where bf16 is multiplied in
fp32 (:func:`dinov2_fsdp.models.products.widens`), a part is all in fp32, and bf16 what it takes, gives and keeps.

The plain modules are the reference, and what runs under autocast and in fp16, whose range LayerScale times weights
could leave here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dinov2_fsdp.models import branches
from dinov2_fsdp.models.fused import (
    compiled,
    gelu,
    gelu_backward,
    layer_norm,
    layer_norm_backward,
    sum_rows,
    transposed,
)
from dinov2_fsdp.models.products import (
    bias_apart,
    by_onednn,
    linear,
    linear_onto,
    outside_autocast,
    packed,
    product_of_rows,
    widened,
)

ACTIVATIONS = ("gelu", "swiglu")

CACHED_ROWS = 1024
"""Tokens that each thread of a CPU takes through a branch at a time."""


def norm_linear(tokens: Tensor, norm: nn.LayerNorm, after: nn.Linear) -> Tensor:
    """Return ``after(norm(tokens))`` for ``(rows, dim)``; kept: the tokens and two statistics of each row."""
    if not applies(tokens, after, also=norm.parameters()):
        return after(norm(tokens))
    out: Tensor = _NormLinear.apply(tokens, norm.weight, norm.bias, after.weight, after.bias, norm.eps)
    return out


def scaled_linear(rows: Tensor, before: nn.Linear, gamma: Tensor | None) -> Tensor:
    """Return ``before(rows) · gamma``, with ``(dim,)`` factors of LayerScale (arXiv 2103.17239) or None; kept: rows."""
    if gamma is None or not applies(rows, before, also=[gamma]):
        out: Tensor = before(rows)
        return out if gamma is None else out * gamma
    out = _ScaledLinear.apply(rows, before.weight, before.bias, gamma)
    return out


def feed_forward(
    tokens: Tensor,
    norm: nn.LayerNorm,
    first: nn.Linear,
    activation: str,
    second: nn.Linear,
    gamma: Tensor | None,
    onto: bool = False,
) -> Tensor:
    """Return ``second(activation(first(norm(tokens)))) · gamma`` for ``(rows, dim)``.

    Kept for the backward pass: the tokens, two statistics of each row, and what ``first`` returns.

    Args:
        activation: one of :data:`ACTIVATIONS`; with ``swiglu``, ``first`` returns gates before values.
        gamma: ``(dim,)`` of LayerScale, or None for none.
        onto: add it to the tokens.
    """
    if not applies(tokens, first, second, also=[*norm.parameters(), *([] if gamma is None else [gamma])]):
        out: Tensor = second(activate(first(norm(tokens)), activation))
        out = out if gamma is None else out * gamma
        return tokens + out if onto else out
    also = (norm.weight, norm.bias, *([] if gamma is None else [gamma]))
    if activation == "gelu" and branches.applies(tokens, first, second, also=also):
        return branches.feed_forward(tokens, norm, first, second, gamma, onto, keeps(first))
    layers = (norm.weight, norm.bias, first.weight, first.bias, second.weight, second.bias, gamma)
    out = _FeedForward.apply(tokens, *layers, activation, norm.eps, onto, keeps(first))
    return out


def feed_forward_onto(
    tokens: Tensor,
    chosen: branches.Chosen,
    norm: nn.LayerNorm,
    first: nn.Linear,
    activation: str,
    second: nn.Linear,
    gamma: Tensor | None,
) -> Tensor | None:
    """Return the tokens with :func:`feed_forward` of the chosen rows added to these; None if that wants other ways."""
    also = [*norm.parameters(), *([] if gamma is None else [gamma])]
    if activation != "gelu" or not applies(tokens, first, second, also=also):
        return None
    if not (branches.applies(tokens, first, second, also=tuple(also)) and chosen.fit(tokens)):
        return None
    return branches.feed_forward(tokens, norm, first, second, gamma, True, keeps(first), chosen)


def activate(hidden: Tensor, activation: str) -> Tensor:
    """Return the activation of ``hidden``, see :func:`feed_forward`."""
    if activation == "gelu":
        return F.gelu(hidden)
    gate, value = hidden.chunk(2, dim=-1)
    return F.silu(gate) * value


def applies(rows: Tensor, *layers: nn.Linear, also: Iterable[Tensor] = ()) -> bool:
    """Return whether layers may run as here, not as plain modules: in the rows' type, all trained or nothing.

    ``also``: parameters of what stands around the layers.
    """
    trained = [layer.weight.requires_grad for layer in layers]
    parameters = (parameter for layer in layers for parameter in layer.parameters())
    return (
        rows.dtype != torch.float16
        and all(layer.weight.dtype == rows.dtype for layer in layers)
        and not torch.is_autocast_enabled(rows.device.type)
        and (
            not torch.is_grad_enabled()
            or all(trained)
            or not (rows.requires_grad or any(parameter.requires_grad for parameter in (*parameters, *also)))
        )
    )


def keeps(*layers: nn.Linear) -> bool:
    """Return whether a backward pass may follow; that a weight is trained does not say so."""
    return torch.is_grad_enabled() and all(layer.weight.requires_grad for layer in layers)


def whole_for(parts: int, like: Tensor) -> Tensor | None:
    """Return new memory for all rows that several parts write to, None for a single part, which is all of them."""
    return torch.empty_like(like) if parts > 1 else None


def rows_of(whole: Tensor | None, rows: slice) -> Tensor | None:
    """Return these rows of what :func:`whole_for` gave."""
    return None if whole is None else whole[rows]


def in_weights(weight: Tensor, bias: Tensor, gamma: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return a linear layer with LayerScale in its weights, which are fewer than the tokens."""
    return (weight, bias) if gamma is None else (weight * gamma[:, None], bias * gamma)


def for_parts(
    parts: int, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, gamma: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a branch's two linear layers, the second with LayerScale, as so many parts of its rows multiply them."""
    weight, bias = in_weights(widened(weight2), widened(bias2), gamma)
    return packed(widened(weight1), parts), widened(bias1), packed(weight, parts), bias


def of_layer_scale(
    of_scaled: Tensor, total: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients in W, b and γ from those in W γ and b γ: with y = (W a + b) γ, W a need not be kept."""
    if gamma is None:
        return of_scaled.to(weight.dtype), total.to(bias.dtype), None
    wide = torch.promote_types(weight.dtype, torch.float32)
    of_gamma = (of_scaled.to(wide) * weight.to(wide)).sum(1) + total.to(wide) * bias.to(wide)
    of_weight, of_bias = of_scaled.mul_(gamma[:, None]), total * gamma
    return of_weight.to(weight.dtype), of_bias.to(bias.dtype), of_gamma.to(gamma.dtype)


def norm_linear_backward(
    of_out: Tensor,
    tokens: Tensor,
    statistics: Sequence[Tensor],
    norm: tuple[Tensor, Tensor, float],
    weight: Tensor,
    sums: Sums,
    total: Tensor | None = None,
    onto: Tensor | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """Return the gradient in the rows ``tokens`` of a linear layer of their norm; add up those in the weights.

    Args:
        of_out: the gradient in the linear layer's output.
        statistics: mean and scale of each row.
        norm: the norm's weight, bias and epsilon.
        weight: the linear layer's.
        sums: to which ``norm_weight``, ``norm_bias``, ``weight`` and ``bias`` are added.
        total: the sum of ``of_out`` over rows, if it is known.
        onto, target: what is added to the gradient, and where that is written to, if anything.
    """
    norm_weight, norm_bias, eps = norm
    normed = layer_norm(tokens, norm_weight, norm_bias, eps)[0]
    sums.add_product("weight", of_out, normed)
    del normed
    sums.add("bias", sum_rows(of_out) if total is None else total)
    mean, scale = statistics
    of_tokens, of_norm_weight, of_norm_bias = layer_norm_backward(
        linear(of_out, weight.t()), tokens, mean, scale, norm_weight, norm_bias, onto, target
    )
    sums.add("norm_weight", of_norm_weight)
    sums.add("norm_bias", of_norm_bias)
    return of_tokens


OF_NORM_LINEAR = ("norm_weight", "norm_bias", "weight", "bias")
"""What :func:`norm_linear_backward` adds up, in the order of a function's arguments."""


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        normed, mean, scale = layer_norm(tokens, norm_weight, norm_bias, eps)
        ctx.save_for_backward(tokens, norm_weight, norm_bias, weight, mean, scale)
        ctx.eps = eps
        return linear(normed, weight, bias)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, norm_weight, norm_bias, weight, *statistics = ctx.saved_tensors
        sums = Sums(1)
        of_tokens = norm_linear_backward(grad, tokens, statistics, (norm_weight, norm_bias, ctx.eps), weight, sums)
        return of_tokens, *(sums[name].to(weight.dtype) for name in OF_NORM_LINEAR), None


class _ScaledLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, bias, gamma)
        return linear(rows, *in_weights(weight, bias, gamma))

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, bias, gamma = ctx.saved_tensors
        of_rows = linear(grad, (weight * gamma[:, None]).t())
        return of_rows, *of_layer_scale(product_of_rows(grad, rows), sum_rows(grad), weight, bias, gamma)


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
        activation: str,
        eps: float,
        onto: bool,
        keep: bool,
    ) -> Tensor:
        ctx.activation, ctx.eps, ctx.onto, ctx.slices = activation, eps, onto, _slices(tokens)
        count = len(ctx.slices)
        norm = (widened(norm_weight), widened(norm_bias), eps)
        first, bias, second, scaled_bias = for_parts(count, weight1, bias1, weight2, bias2, gamma)
        whole, kept = whole_for(count, tokens), []
        for some in ctx.slices:
            rows = widened(tokens[some])
            normed, mean, scale = layer_norm(rows, *norm)
            if activation == "gelu":
                apart = bias_apart(normed, first) and compiled(normed)
                hidden = linear(normed, first, None if apart else bias)
                activated, hidden_kept = gelu(hidden, bias if apart else None, tokens.dtype if keep else None)
            else:
                hidden = linear(normed, first, bias)
                activated, hidden_kept = activate(hidden, activation), hidden.to(tokens.dtype) if keep else None
            del normed, hidden
            out = linear_onto(activated, second, scaled_bias, rows if onto else None, rows_of(whole, some))
            del activated
            kept += [hidden_kept, mean, scale] if keep else []
        ctx.save_for_backward(tokens, norm_weight, norm_bias, weight1, weight2, bias2, gamma, *kept)
        if whole is not None:
            return whole
        # torch 2.11's compiler gives zeros for gradients if what is returned went through a `to` that changed nothing.
        return out if out.dtype == tokens.dtype else out.to(tokens.dtype)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, norm_weight, norm_bias, weight1, weight2, bias2, gamma, *kept = ctx.saved_tensors
        scaled, first = widened(weight2), widened(weight1)
        scaled = scaled if gamma is None else scaled * gamma[:, None]
        norm, count = (widened(norm_weight), widened(norm_bias), ctx.eps), len(ctx.slices)
        whole, sums = whole_for(count, tokens), Sums(count)
        for i, some in enumerate(ctx.slices):
            hidden, *statistics = kept[3 * i : 3 * i + 3]
            of_out = widened(grad[some])
            if ctx.activation == "gelu" and compiled(hidden):
                of_activated = linear(of_out, scaled.t())
                of_hidden, total, activated = gelu_backward(of_activated, hidden)
                sums.add_product("scaled", of_out, activated)
            else:
                hidden = widened(hidden)
                activated = activate(hidden, ctx.activation)
                sums.add_product("scaled", of_out, activated)
                del activated
                of_activated = linear(of_out, scaled.t())
                of_hidden, total = _activate_backward(of_activated, hidden, ctx.activation), None
            activated = of_activated = hidden = None  # type: ignore[assignment]
            sums.add("bias2", sum_rows(of_out))
            ends = (of_out if ctx.onto else None, rows_of(whole, some))
            rows = widened(tokens[some])
            out = norm_linear_backward(of_hidden, rows, statistics, norm, first, sums, total, *ends)
        of_second = of_layer_scale(sums["scaled"], sums["bias2"], weight2, bias2, gamma)
        of_first = (sums[name].to(weight1.dtype) for name in OF_NORM_LINEAR)
        out = out.to(tokens.dtype) if whole is None else whole
        return out, *of_first, *of_second, None, None, None, None


class Sums:
    """Named sums over parts of the rows, kept in fp32 or wider if there are several parts."""

    def __init__(self, parts: int) -> None:
        self._totals: dict[str, Tensor] = {}
        self._turned: set[str] = set()
        self._several = parts > 1

    def __getitem__(self, name: str) -> Tensor:
        total = self._totals[name]
        return transposed(total) if name in self._turned else total

    def add(self, name: str, term: Tensor) -> None:
        if name in self._totals:
            self._totals[name] += term
        else:
            wide = torch.promote_types(term.dtype, torch.float32)
            self._totals[name] = term.to(wide) if self._several else term

    def add_product(self, name: str, left: Tensor, right: Tensor) -> None:
        """Add ``leftᵀ · right``."""
        left, right = widened(left), widened(right)
        onednn = by_onednn(left, right)
        # A CPU's libraries are faster with one side of the result first: oneDNN with the shorter, MKL with the longer.
        first, second = left.shape[1], right.shape[1]
        if self._several and (first > second if onednn else first < second):
            self._turned.add(name)
            left, right = right, left
        if not onednn and name in self._totals and self._totals[name].dtype == left.dtype:
            self._totals[name].addmm_(left.t(), right)
        else:
            self.add(name, product_of_rows(left, right))


def _activate_backward(grad: Tensor, hidden: Tensor, activation: str) -> Tensor:
    """Return the gradient in ``hidden`` from that in its activation, which may be overwritten."""
    if activation == "gelu":
        out: Tensor = torch.ops.aten.gelu_backward.grad_input(grad, hidden, grad_input=grad)
        return out
    gate, value = hidden.chunk(2, dim=-1)
    of_gate = torch.ops.aten.silu_backward(grad * value, gate)
    return torch.cat([of_gate, grad * F.silu(gate)], dim=-1)


def rows_at_a_time() -> int:
    """Return of how many tokens a CPU computes all that lies between two ends of a branch before it takes others."""
    return CACHED_ROWS * torch.get_num_threads()


def _slices(rows: Tensor) -> list[slice]:
    """Return parts of about equal size, of so many rows that what is computed of them stays in a CPU's cache."""
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        # A compiler has its own ways, would unroll the loop, and settle on this number of rows.
        return [slice(None)]
    size = max(1, -(-len(rows) // max(1, -(-len(rows) // rows_at_a_time()))))
    return [slice(start, start + size) for start in range(0, len(rows), size)] or [slice(None)]
