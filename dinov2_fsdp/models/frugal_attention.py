"""The attention branch of a block, a few sequences at a time from its norm to its projection: for a CPU.

As in :mod:`dinov2_fsdp.models.frugal`, what lies between the branch's ends stays in the cache, forward and backward.
Kept for the backward pass are queries, keys and values (as plain products want them, where those are what computes
attention), the softmax weights and the projection's input, in parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dinov2_fsdp.models import branches, frugal
from dinov2_fsdp.models.frugal import OF_NORM_LINEAR, Sums, in_weights, norm_linear_backward, of_layer_scale
from dinov2_fsdp.models.fused import (
    BY_FP32,
    attention,
    attention_backward,
    attention_compiled,
    join_heads,
    layer_norm,
    split_heads,
    sum_rows,
)
from dinov2_fsdp.models.layout import Layout
from dinov2_fsdp.models.plain_attention import attend_parts, attend_parts_backward
from dinov2_fsdp.models.products import linear, linear_onto, outside_autocast, widened

_KEPT_EACH = 5
"""Tensors that are kept of a few sequences."""


def attention_branch(
    tokens: Tensor,
    layout: Layout,
    heads: int,
    norm: nn.LayerNorm,
    qkv: nn.Linear,
    proj: nn.Linear,
    gamma: Tensor | None,
    onto: bool = False,
) -> Tensor:
    """Return ``proj(attention(qkv(norm(tokens)))) · gamma`` for packed ``(tokens, dim)``; ask :func:`applies` first.

    Args:
        gamma: ``(dim,)`` of LayerScale (arXiv 2103.17239), or None for none.
        onto: add it to the tokens.
    """
    also, keep = (norm.weight, norm.bias, *([] if gamma is None else [gamma])), frugal.keeps(qkv, proj)
    even = tokens.shape[-1] // heads % 2 == 0  # bf16 is multiplied in pairs
    if even and branches.applies(tokens, qkv, proj, also=also, parts=3):
        return branches.attention_branch(tokens, layout, heads, norm, qkv, proj, gamma, onto, keep)
    layers = (norm.weight, norm.bias, qkv.weight, qkv.bias, proj.weight, proj.bias, gamma)
    out: Tensor = _AttentionBranch.apply(tokens, *layers, layout, heads, norm.eps, onto, keep)
    return out


def attention_onto(
    tokens: Tensor,
    chosen: branches.Chosen,
    layout: Layout,
    heads: int,
    norm: nn.LayerNorm,
    qkv: nn.Linear,
    proj: nn.Linear,
    gamma: Tensor | None,
) -> Tensor | None:
    """Return the tokens with the branch of the chosen rows added to these; None if that wants other ways.

    ``layout``: that of the chosen rows. Ask :func:`applies` first.
    """
    also, keep = (norm.weight, norm.bias, *([] if gamma is None else [gamma])), frugal.keeps(qkv, proj)
    even = tokens.shape[-1] // heads % 2 == 0
    if not (even and branches.applies(tokens, qkv, proj, also=also, parts=3) and chosen.fit(tokens)):
        return None
    return branches.attention_branch(tokens, layout, heads, norm, qkv, proj, gamma, True, keep, chosen)


def applies(tokens: Tensor, qkv: nn.Linear, proj: nn.Linear, also: Iterable[Tensor] = ()) -> bool:
    """Return whether the branch may run here: on a CPU, not compiled, all of it trained or nothing."""
    here = tokens.device.type == "cpu" and not torch.compiler.is_compiling()
    return here and frugal.applies(tokens, qkv, proj, also=also)


def _few_sequences(layout: Layout) -> Iterator[tuple[slice, int]]:
    """Yield the rows of a few sequences, and how many there are."""
    for start, end, sequences, length in layout.spans():
        rows = max(1, round(frugal.rows_at_a_time() / length))
        few = -(-sequences // -(-sequences // rows))
        for first in range(start, end, few * length):
            last = min(end, first + few * length)
            yield slice(first, last), (last - first) // length


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
        ctx.heads, ctx.eps, ctx.onto, ctx.few, ctx.compiled = heads, eps, onto, list(_few_sequences(layout)), []
        count, dim = len(ctx.few), tokens.shape[-1]
        norm = (widened(norm_weight), widened(norm_bias), eps)
        first, bias, second, scaled_bias = frugal.for_parts(count, weight1, bias1, weight2, bias2, gamma)
        whole, kept = frugal.whole_for(count, tokens), []
        for rows, sequences in ctx.few:
            some = widened(tokens[rows])
            normed, mean, scale = layer_norm(some, *norm)
            qkv = linear(normed, first, bias).unflatten(-1, (3, heads, -1))
            del normed
            ctx.compiled.append(attention_compiled(qkv))
            if ctx.compiled[-1]:
                attended, weights = attention(qkv, sequences, BY_FP32, qkv.new_empty(len(mean), dim)), qkv.new_empty(0)
            else:
                qkv = split_heads(qkv, sequences, qkv.shape[-1] ** -0.5)
                found, weights = attend_parts(qkv)
                attended = found.new_empty(len(mean), dim)
                join_heads(found, sequences, attended.unflatten(-1, (heads, -1)))
            out = linear_onto(attended, second, scaled_bias, some if onto else None, frugal.rows_of(whole, rows))
            kept += [*(part.to(tokens.dtype) for part in (qkv, weights, attended)), mean, scale] if keep else []
        ctx.save_for_backward(tokens, norm_weight, norm_bias, weight1, weight2, bias2, gamma, *kept)
        return out.to(tokens.dtype) if whole is None else whole

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, norm_weight, norm_bias, weight1, weight2, bias2, gamma, *kept = ctx.saved_tensors
        dim, heads, count = tokens.shape[-1], ctx.heads, len(ctx.few)
        norm, first = (widened(norm_weight), widened(norm_bias), ctx.eps), widened(weight1)
        scaled = in_weights(widened(weight2), bias2, gamma)[0]
        whole, sums = frugal.whole_for(count, tokens), Sums(count)
        for i, (rows, sequences) in enumerate(ctx.few):
            qkv, weights, attended, *statistics = kept[_KEPT_EACH * i : _KEPT_EACH * (i + 1)]
            of_out = widened(grad[rows])
            sums.add_product("scaled", of_out, attended)
            sums.add("bias2", sum_rows(of_out))
            of_attended = linear(of_out, scaled.t())
            if ctx.compiled[i]:
                of_qkv = of_attended.new_empty(qkv.shape)
                attention_backward(of_attended, widened(qkv), sequences, BY_FP32, of_qkv)
            else:
                of_heads = split_heads(of_attended.unflatten(-1, (1, heads, -1)), sequences)[0]
                of_qkv = of_attended.new_empty(len(attended), 3, heads, dim // heads)
                attend_parts_backward(of_heads, widened(qkv), widened(weights), of_qkv, sequences)
            ends = (of_out if ctx.onto else None, frugal.rows_of(whole, rows))
            of_qkv = of_qkv.flatten(1)
            some = widened(tokens[rows])
            out = norm_linear_backward(of_qkv, some, statistics, norm, first, sums, None, *ends)
        of_first = (sums[name].to(weight1.dtype) for name in OF_NORM_LINEAR)
        of_second = of_layer_scale(sums["scaled"], sums["bias2"], weight2, bias2, gamma)
        out = out.to(tokens.dtype) if whole is None else whole
        return out, *of_first, *of_second, None, None, None, None, None
