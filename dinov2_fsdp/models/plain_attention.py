"""Attention as matrix products, a few sequences at a time: the fastest way on a CPU for short sequences.

Training in one type takes :mod:`dinov2_fsdp.models.frugal_attention`, which has these products between its own.

torch's fused CPU kernel takes several times as long in its backward pass, ten times in bf16. Plain products left to
autograd lay the parts of ``qkv`` out anew for every product, and pad their gradients with zeros to add them up. Here
``qkv`` and the softmax weights are kept; all else is small enough to stay in a processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinov2_fsdp.models.fused import join_heads, softmax, softmax_backward, split_heads
from dinov2_fsdp.models.layout import Layout
from dinov2_fsdp.models.products import bmm

CACHED = 2**20
"""Softmax weights that each thread of a CPU computes at a time."""


def attend_plainly(qkv: Tensor, layout: Layout) -> Tensor:
    """Return softmax(q·kᵀ/√d)·v for ``(tokens, 3, heads, head_dim)``: ``(tokens, heads, head_dim)``."""
    with torch.autocast(qkv.device.type, enabled=False):
        if torch.is_grad_enabled() and qkv.requires_grad:
            out: Tensor = _PlainAttention.apply(qkv, layout)
            return out
        return _attend(qkv, layout, keep=False)[0]


def _attend(qkv: Tensor, layout: Layout, keep: bool) -> tuple[Tensor, list[Tensor]]:
    """Return the result and, if asked to keep them, the softmax weights of each group,
    ``(sequences, heads, length, length)``."""
    _, _, heads, dim = qkv.shape
    out, kept = qkv.new_empty(len(qkv), heads, dim), []
    for start, _, sequences, length in layout.spans():
        weights = qkv.new_empty(sequences if keep else 0, heads, length, length)
        for some in _slices(sequences, heads * length**2, qkv.device):
            rows, few = slice(start + some.start * length, start + some.stop * length), some.stop - some.start
            parts = split_heads(qkv[rows], few, dim**-0.5)
            found, _ = attend_parts(parts, weights[some].flatten(0, 1) if keep else None)
            join_heads(found, few, out[rows])
        kept.append(weights)
    return out, kept


def attend_parts(parts: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return what attention gives for q/√d, k and v, ``(3, sequences · heads, length, head_dim)``:
    ``(sequences · heads, length, head_dim)``, and the softmax weights, written into ``out`` if given."""
    query, key, value = parts
    weights = softmax(bmm(query, key.transpose(1, 2)), out)
    return bmm(weights, value), weights


def attend_parts_backward(of_out: Tensor, parts: Tensor, weights: Tensor, target: Tensor, sequences: int) -> None:
    """Write the gradient in q, k and v into ``target``, ``(sequences · length, 3, heads, head_dim)``, from that in the
    result."""
    query, key, value = parts
    of_scores = softmax_backward(bmm(of_out, value.transpose(1, 2)), weights)
    join_heads(bmm(of_scores, key), sequences, target[:, 0], target.shape[-1] ** -0.5)
    join_heads(bmm(query.transpose(1, 2), of_scores).transpose(1, 2), sequences, target[:, 1])
    join_heads(bmm(of_out.transpose(1, 2), weights).transpose(1, 2), sequences, target[:, 2])


def _slices(sequences: int, weights: int, device: torch.device) -> Iterator[slice]:
    # A compiler has its own ways, and would unroll the loop.
    few = device.type == "cpu" and not torch.compiler.is_compiling()
    size = max(1, CACHED * torch.get_num_threads() // weights) if few else max(1, sequences)
    return (slice(start, min(sequences, start + size)) for start in range(0, sequences, size))


class _PlainAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, layout: Layout) -> Tensor:
        out, kept = _attend(qkv, layout, keep=True)
        ctx.layout = layout
        ctx.save_for_backward(qkv, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        qkv, *kept = ctx.saved_tensors
        of_qkv = torch.empty_like(qkv)
        for (start, _, sequences, length), all_weights in zip(ctx.layout.spans(), kept, strict=True):
            for some in _slices(sequences, all_weights[:1].numel(), grad.device):
                rows, few = slice(start + some.start * length, start + some.stop * length), some.stop - some.start
                parts = split_heads(qkv[rows], few, qkv.shape[-1] ** -0.5)
                of_out = split_heads(grad[rows, None], few)[0]
                attend_parts_backward(of_out, parts, all_weights[some].flatten(0, 1), of_qkv[rows], few)
        return of_qkv, None
