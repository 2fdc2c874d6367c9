"""Linear layers with what stands around them, keeping less for the backward pass than autograd would.

Between two linear layers of a block stand cheap operations: layer norm, GELU or gate, LayerScale. Autograd keeps the
output of each; here they are computed again in the backward pass, from inputs that are kept anyway. Of what the blocks
of a plain ViT keep, that saves more than a third (docs/performance.md).

The plain modules are the reference, and what runs under autocast and in fp16, whose range LayerScale times weights
could leave here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ACTIVATIONS = ("none", "gelu", "swiglu")

CACHED_ROWS = 512
"""Tokens that each thread of a CPU activates at a time."""


def norm_linear(tokens: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
    """Return ``linear(norm(tokens))`` for ``(rows, dim)``; kept: the tokens and two statistics of each row."""
    if not _pays(tokens, linear.weight):
        return linear(norm(tokens))
    out: Tensor = _NormLinear.apply(tokens, norm.weight, norm.bias, linear.weight, linear.bias, norm.eps)
    return out


def activated_linear(hidden: Tensor, activation: str, linear: nn.Linear, gamma: Tensor | None) -> Tensor:
    """Return ``linear(activation(hidden)) · gamma``; kept: ``hidden``.

    Args:
        hidden: ``(rows, width)``; with ``swiglu`` ``(rows, 2 · width)``, gates before values.
        activation: one of :data:`ACTIVATIONS`.
        gamma: ``(dim,)`` of LayerScale (arXiv 2103.17239), or None for none.
    """
    if _as_plain_products(hidden, linear.weight):
        if torch.is_grad_enabled() and (hidden.requires_grad or linear.weight.requires_grad):
            out: Tensor = _ActivatedLinear.apply(hidden, activation, linear.weight, linear.bias, gamma)
            return out
        return _activated_linear(hidden, activation, linear.weight, linear.bias, gamma)
    out = linear(activate(hidden, activation))
    return out if gamma is None else out * gamma


def activate(hidden: Tensor, activation: str) -> Tensor:
    """Return the activation of ``hidden``, see :func:`activated_linear`."""
    if activation == "gelu":
        return F.gelu(hidden)
    if activation == "swiglu":
        gate, value = hidden.chunk(2, dim=-1)
        return F.silu(gate) * value
    return hidden


def _pays(rows: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and weight.requires_grad and _as_plain_products(rows, weight)


def _as_plain_products(rows: Tensor, weight: Tensor) -> bool:
    return rows.dtype == weight.dtype != torch.float16 and not torch.is_autocast_enabled(rows.device.type)


def _activated_linear(hidden: Tensor, activation: str, weight: Tensor, bias: Tensor, gamma: Tensor | None) -> Tensor:
    if gamma is not None:
        # Into the weights, which are fewer than the tokens.
        weight, bias = weight * gamma[:, None], bias * gamma
    if activation == "none":
        return F.linear(hidden, weight, bias)
    out = hidden.new_empty(len(hidden), len(weight))
    for some in _slices(hidden):
        torch.addmm(bias, activate(hidden[some], activation), weight.t(), out=out[some])
    return out


def _slices(rows: Tensor) -> Iterator[slice]:
    """Yield parts of so many rows that what is computed of them is still in a CPU's cache when it is used."""
    # A compiler has its own ways, and would unroll the loop.
    few = rows.device.type == "cpu" and not torch.compiler.is_compiling()
    size = CACHED_ROWS * torch.get_num_threads() if few else max(1, len(rows))
    return (slice(start, start + size) for start in range(0, len(rows), size))


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        normed, mean, scale = torch.native_layer_norm(tokens, [tokens.shape[-1]], norm_weight, norm_bias, eps)
        ctx.save_for_backward(tokens, norm_weight, norm_bias, weight, mean, scale)
        ctx.eps = eps
        return F.linear(normed, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, norm_weight, norm_bias, weight, mean, scale = ctx.saved_tensors
        shape = [tokens.shape[-1]]
        normed = torch.native_layer_norm(tokens, shape, norm_weight, norm_bias, ctx.eps)[0]
        grad_weight = grad.t() @ normed
        of_tokens, of_norm_weight, of_norm_bias = torch.ops.aten.native_layer_norm_backward(
            grad @ weight, tokens, shape, mean, scale, norm_weight, norm_bias, [True, True, True]
        )
        return of_tokens, of_norm_weight, of_norm_bias, grad_weight, grad.sum(0), None


class _ActivatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, activation: str, weight: Tensor, bias: Tensor, gamma: Tensor | None
    ) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(hidden, weight, bias, gamma)
        return _activated_linear(hidden, activation, weight, bias, gamma)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, gamma = ctx.saved_tensors
        activated = activate(hidden, ctx.activation)
        if not ctx.needs_input_grad[2]:
            scaled = weight if gamma is None else weight * gamma[:, None]
            return _of_hidden(grad, scaled, hidden, activated, ctx.activation), None, None, None, None
        # With y = (W a + b) γ, the gradients of W and γ are both sums of g aᵀ, so that W a need not be kept.
        outer = grad.t() @ activated
        total = grad.sum(0)
        if gamma is None:
            return _of_hidden(grad, weight, hidden, activated, ctx.activation), None, outer, total, None
        wide = torch.promote_types(weight.dtype, torch.float32)
        of_gamma = (outer.to(wide) * weight.to(wide)).sum(1) + total.to(wide) * bias.to(wide)
        of_weight = outer.mul_(gamma[:, None])
        of_hidden = _of_hidden(grad, weight * gamma[:, None], hidden, activated, ctx.activation)
        return of_hidden, None, of_weight, total * gamma, of_gamma.to(gamma.dtype)


def _of_hidden(grad: Tensor, weight: Tensor, hidden: Tensor, activated: Tensor, activation: str) -> Tensor:
    """Return the gradient of the loss in ``hidden`` from that in the output; ``activated`` may be overwritten."""
    if activation == "none":
        return grad @ weight
    out = activated if activation == "gelu" else torch.empty_like(hidden)
    for some in _slices(grad):
        of_activated = grad[some] @ weight
        if activation == "gelu":
            torch.ops.aten.gelu_backward.grad_input(of_activated, hidden[some], grad_input=out[some])
        else:
            gate, value = hidden[some].chunk(2, dim=-1)
            if torch.compiler.is_compiling():  # it writes into no strided memory
                of_gate = torch.ops.aten.silu_backward(of_activated * value, gate)
                return torch.cat([of_gate, of_activated * F.silu(gate)], dim=-1)
            of_gate, of_value = out[some].chunk(2, dim=-1)
            torch.ops.aten.silu_backward.grad_input(of_activated * value, gate, grad_input=of_gate)
            torch.mul(of_activated, F.silu(gate), out=of_value)
    return out
