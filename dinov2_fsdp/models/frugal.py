"""Linear layers with what stands around them, keeping less for the backward pass than autograd would.

Between two linear layers of a block stand cheap operations: layer norm, GELU or gate, LayerScale. Autograd keeps the
output of each; here they are computed again in the backward pass, from inputs that are kept anyway. Of what the blocks
of a plain ViT keep, that saves more than a third (docs/performance.md).

On a CPU a feed-forward branch takes so many rows at a time that what lies between its ends stays in the cache, forward
and backward: the wide tensors never stand in memory as a whole, but for the kept one, in parts.

The plain modules are the reference, and what runs under autocast and in fp16, whose range LayerScale times weights
could leave here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dinov2_fsdp.models.products import linear

ACTIVATIONS = ("gelu", "swiglu")

CACHED_ROWS = 512
"""Tokens that each thread of a CPU takes through a branch at a time."""


def norm_linear(tokens: Tensor, norm: nn.LayerNorm, after: nn.Linear) -> Tensor:
    """Return ``after(norm(tokens))`` for ``(rows, dim)``; kept: the tokens and two statistics of each row."""
    if not applies(tokens, after):
        return after(norm(tokens))
    out: Tensor = _NormLinear.apply(tokens, norm.weight, norm.bias, after.weight, after.bias, norm.eps)
    return out


def scaled_linear(rows: Tensor, before: nn.Linear, gamma: Tensor | None) -> Tensor:
    """Return ``before(rows) · gamma``, with ``(dim,)`` factors of LayerScale (arXiv 2103.17239) or None; kept: rows."""
    if gamma is None or not applies(rows, before):
        out: Tensor = before(rows)
        return out if gamma is None else out * gamma
    out = _ScaledLinear.apply(rows, before.weight, before.bias, gamma)
    return out


def feed_forward(
    tokens: Tensor, norm: nn.LayerNorm, first: nn.Linear, activation: str, second: nn.Linear, gamma: Tensor | None
) -> Tensor:
    """Return ``second(activation(first(norm(tokens)))) · gamma`` for ``(rows, dim)``.

    Kept for the backward pass: the tokens, two statistics of each row, and what ``first`` returns.

    Args:
        activation: one of :data:`ACTIVATIONS`; with ``swiglu``, ``first`` returns gates before values.
        gamma: ``(dim,)`` of LayerScale, or None for none.
    """
    if not applies(tokens, first, second):
        out: Tensor = second(activate(first(norm(tokens)), activation))
        return out if gamma is None else out * gamma
    layers = (norm.weight, norm.bias, first.weight, first.bias, second.weight, second.bias, gamma)
    out = _FeedForward.apply(tokens, *layers, activation, norm.eps, keeps(first))
    return out


def activate(hidden: Tensor, activation: str) -> Tensor:
    """Return the activation of ``hidden``, see :func:`feed_forward`."""
    if activation == "gelu":
        return F.gelu(hidden)
    gate, value = hidden.chunk(2, dim=-1)
    return F.silu(gate) * value


def applies(rows: Tensor, *layers: nn.Linear) -> bool:
    """Return whether layers may run as here, not as plain modules: in the rows' type, all trained or nothing."""
    trained = [layer.weight.requires_grad for layer in layers]
    return (
        rows.dtype != torch.float16
        and all(layer.weight.dtype == rows.dtype for layer in layers)
        and not torch.is_autocast_enabled(rows.device.type)
        and (not torch.is_grad_enabled() or all(trained) or not (any(trained) or rows.requires_grad))
    )


def keeps(*layers: nn.Linear) -> bool:
    """Return whether a backward pass may follow; that a weight is trained does not say so."""
    return torch.is_grad_enabled() and all(layer.weight.requires_grad for layer in layers)


def put(part: Tensor, rows: slice, whole: Tensor, like: Tensor, parts: int) -> Tensor:
    """Return ``whole`` with ``part`` in these rows: new memory as ``like`` if it is empty, none for a single part."""
    if parts == 1:
        return part
    whole = whole if whole.numel() else torch.empty_like(like)
    whole[rows] = part
    return whole


def in_weights(weight: Tensor, bias: Tensor, gamma: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return a linear layer with LayerScale in its weights, which are fewer than the tokens."""
    return (weight, bias) if gamma is None else (weight * gamma[:, None], bias * gamma)


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


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        normed, mean, scale = torch.native_layer_norm(tokens, [tokens.shape[-1]], norm_weight, norm_bias, eps)
        ctx.save_for_backward(tokens, norm_weight, norm_bias, weight, mean, scale)
        ctx.eps = eps
        return linear(normed, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, norm_weight, norm_bias, weight, mean, scale = ctx.saved_tensors
        shape = [tokens.shape[-1]]
        normed = torch.native_layer_norm(tokens, shape, norm_weight, norm_bias, ctx.eps)[0]
        grad_weight = grad.t() @ normed
        of_tokens, of_norm_weight, of_norm_bias = torch.ops.aten.native_layer_norm_backward(
            linear(grad, weight.t()), tokens, shape, mean, scale, norm_weight, norm_bias, [True, True, True]
        )
        return of_tokens, of_norm_weight, of_norm_bias, grad_weight, grad.sum(0), None


class _ScaledLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, bias, gamma)
        return linear(rows, *in_weights(weight, bias, gamma))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, bias, gamma = ctx.saved_tensors
        of_rows = linear(grad, (weight * gamma[:, None]).t())
        return of_rows, *of_layer_scale(grad.t() @ rows, grad.sum(0), weight, bias, gamma)


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
        keep: bool,
    ) -> Tensor:
        ctx.activation, ctx.eps, ctx.slices = activation, eps, _slices(tokens)
        weight, bias = in_weights(weight2, bias2, gamma)
        out, kept = torch.empty(0), []
        for some in ctx.slices:
            normed, mean, scale = torch.native_layer_norm(tokens[some], [tokens.shape[-1]], norm_weight, norm_bias, eps)
            hidden = linear(normed, weight1, bias1)
            out = put(linear(activate(hidden, activation), weight, bias), some, out, tokens, len(ctx.slices))
            kept += [hidden, mean, scale] if keep else []
        ctx.save_for_backward(tokens, norm_weight, norm_bias, weight1, weight2, bias2, gamma, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, norm_weight, norm_bias, weight1, weight2, bias2, gamma, *kept = ctx.saved_tensors
        shape = [tokens.shape[-1]]
        scaled = weight2 if gamma is None else weight2 * gamma[:, None]
        of_tokens = torch.empty(0)
        slices = ctx.slices
        of_weight1, of_scaled = (Sum(len(slices)) for _ in range(2))
        # On a CPU, products whose result has its longer side first are faster.
        turned = len(slices) > 1
        of_bias1, of_bias2, of_norm_weight, of_norm_bias = (Sum(len(slices)) for _ in range(4))
        for i, some in enumerate(slices):
            hidden, mean, scale = kept[3 * i : 3 * i + 3]
            activated = activate(hidden, ctx.activation)
            of_scaled.add_product(*((activated, grad[some]) if turned else (grad[some], activated)))
            del activated
            of_bias2.add(grad[some].sum(0))
            of_hidden = _activate_backward(linear(grad[some], scaled.t()), hidden, ctx.activation)
            normed = torch.native_layer_norm(tokens[some], shape, norm_weight, norm_bias, ctx.eps)[0]
            of_weight1.add_product(of_hidden, normed)
            del normed
            of_bias1.add(of_hidden.sum(0))
            found, *of_norm = torch.ops.aten.native_layer_norm_backward(
                linear(of_hidden, weight1.t()), tokens[some], shape, mean, scale, norm_weight, norm_bias, [True] * 3
            )
            of_tokens = put(found, some, of_tokens, tokens, len(slices))
            of_norm_weight.add(of_norm[0])
            of_norm_bias.add(of_norm[1])
        dtype = weight1.dtype
        of_scaled_weight = of_scaled.total.t().contiguous() if turned else of_scaled.total
        of_second = of_layer_scale(of_scaled_weight, of_bias2.total, weight2, bias2, gamma)
        of_first = (of.total.to(dtype) for of in (of_norm_weight, of_norm_bias, of_weight1, of_bias1))
        return of_tokens, *of_first, *of_second, None, None, None


class Sum:
    """A sum over slices of the rows, kept in fp32 or wider if there are several."""

    def __init__(self, terms: int) -> None:
        self.total = torch.empty(0)
        self._terms, self._added = terms, 0

    def add(self, term: Tensor) -> None:
        if self._added:
            self.total += term
        else:
            self.total = term if self._terms == 1 else term.to(torch.promote_types(term.dtype, torch.float32))
        self._added += 1

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """Add ``leftᵀ · right``."""
        if self._added and self.total.dtype == left.dtype:
            self.total.addmm_(left.t(), right)
        else:
            self.add(left.t() @ right)


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
