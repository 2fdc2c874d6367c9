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
    for start, end, sequences, length in layout.spans():
        source, target = by_head(qkv[start:end], sequences), by_head(out[start:end, None], sequences)[0]
        weights = qkv.new_empty(sequences if keep else 0, heads, length, length)
        for some in _slices(sequences, heads * length**2, qkv.device):
            found, _ = attend_parts(queries_keys_values(source[:, some]), weights[some].flatten(0, 1) if keep else None)
            target[some].copy_(found.view_as(target[some]))
        kept.append(weights)
    return out, kept


def by_head(packed: Tensor, sequences: int) -> Tensor:
    """Return a view ``(parts, sequences, heads, length, head_dim)`` of ``(tokens, parts, heads, head_dim)``."""
    return packed.unflatten(0, (sequences, -1)).permute(2, 0, 3, 1, 4)


def queries_keys_values(source: Tensor) -> Tensor:
    """Return q/√d, k and v, ``(3, sequences · heads, length, head_dim)``, from a view as of :func:`by_head`."""
    parts = source.clone(memory_format=torch.contiguous_format).flatten(1, 2)
    # Not on the way: arithmetic between tensors of different strides takes three times as long as copying.
    parts[0].mul_(source.shape[-1] ** -0.5)
    return parts


def attend_parts(parts: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return what attention gives for :func:`queries_keys_values`, ``(sequences · heads, length, head_dim)``, and the
    softmax weights, written into ``out`` if given."""
    query, key, value = parts
    scores = bmm(query, key.transpose(1, 2))
    weights = torch.softmax(scores, dim=-1, out=scores if out is None else out)
    return bmm(weights, value), weights


def attend_parts_backward(of_out: Tensor, parts: Tensor, weights: Tensor, target: Tensor) -> None:
    """Write the gradient in q, k and v into ``target``, a view as of :func:`by_head`, from that in the result."""
    query, key, value = parts
    of_weights = bmm(of_out, value.transpose(1, 2))
    of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
    shape = target[0].shape
    target[0].copy_(bmm(of_scores, key).mul_(shape[-1] ** -0.5).view(shape))
    target[1].copy_(bmm(query.transpose(1, 2), of_scores).transpose(1, 2).view(shape))
    target[2].copy_(bmm(of_out.transpose(1, 2), weights).transpose(1, 2).view(shape))


def _slices(sequences: int, weights: int, device: torch.device) -> Iterator[slice]:
    # A compiler has its own ways, and would unroll the loop.
    few = device.type == "cpu" and not torch.compiler.is_compiling()
    size = max(1, CACHED * torch.get_num_threads() // weights) if few else max(1, sequences)
    return (slice(start, start + size) for start in range(0, sequences, size))


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
        for (start, end, sequences, _), all_weights in zip(ctx.layout.spans(), kept, strict=True):
            source, target = by_head(qkv[start:end], sequences), by_head(of_qkv[start:end], sequences)
            of_target = by_head(grad[start:end, None], sequences)[0]
            for some in _slices(sequences, all_weights[:1].numel(), grad.device):
                parts, of_out = queries_keys_values(source[:, some]), of_target[some].flatten(0, 1).contiguous()
                attend_parts_backward(of_out, parts, all_weights[some].flatten(0, 1), target[:, some])
        return of_qkv, None
