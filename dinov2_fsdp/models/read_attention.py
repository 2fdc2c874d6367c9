"""The last block's attention branch by compiled code, for the tokens alone that somebody reads.

Of a training step's last block the heads read class tokens and masked patches, one token in ten of a DINOv2 recipe.
Keys and values are those of all tokens; queries, scores, the projection, and the gradients of all these are needed for
what is read. The same mathematics as :mod:`dinov2_fsdp.models.branches`, whose branch runs on all tokens.

Elsewhere than here (:func:`applies`) a block computes its attention for all, and picks what is read afterwards: how
many queries a sequence has, a GPU's kernels would have to be told by the host, which would wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from dinov2_fsdp.models import branches, frugal, frugal_attention
from dinov2_fsdp.models.branch_operations import operations
from dinov2_fsdp.models.fused import are_rows, checked, loaded, multiplied
from dinov2_fsdp.models.layout import Layout
from dinov2_fsdp.models.products import outside_autocast
from dinov2_fsdp.models.stochastic_depth import Subset


@dataclass(frozen=True)
class Read:
    """What is read of the sequences that an attention branch runs on.

    Attributes:
        rows: ``(queries,)`` int64, rows of the packed tokens, a sequence's after the other's.
        places: ``(queries,)`` int64, where each stands among all that is read.
        factors: ``(queries, 1)`` fp32, what its result is multiplied by.
        starts: ``(sequences + 1,)`` int64, each sequence's first query; at last their number.
        layout: of the sequences.
        kept: ``(kept_tokens,)`` int64, their rows in the packed tokens; None if they are all.
    """

    rows: Tensor
    places: Tensor
    factors: Tensor
    starts: Tensor
    layout: Layout
    kept: Tensor | None


def read_of(rows: Tensor, tokens: int, layout: Layout, subset: Subset | None) -> Read:
    """Return which of the rows ``(chosen,)`` are of the sequences that a branch keeps, or of all in the layout."""
    at = rows.numpy()  # where nothing waits for a device
    if subset is None:
        places, factors = np.arange(len(at)), np.ones(len(at), np.float32)
    else:
        # A row of the packed tokens → its row among the sequences that are kept, or none.
        within = np.full(tokens, -1)
        within[subset.rows.numpy()] = np.arange(len(subset.rows))
        places = np.flatnonzero(within[at] >= 0)
        at, layout = within[at[places]], subset.layout
        factors = subset.scale.flatten().numpy()[at]
    order = np.argsort(at, kind="stable")
    edges = [np.arange(start, end, length) for start, end, _, length in layout.spans()]
    starts = np.searchsorted(at[order], np.append(np.concatenate(edges), layout.total_tokens))
    return Read(
        rows=rows[torch.from_numpy(places[order])],
        places=torch.from_numpy(places[order]),
        factors=torch.from_numpy(factors[order])[:, None],
        starts=torch.from_numpy(starts),
        layout=layout,
        kept=None if subset is None else subset.rows,
    )


def attention_read(
    tokens: Tensor,
    rows: Tensor,
    layout: Layout,
    subset: Subset | None,
    heads: int,
    norm: nn.LayerNorm,
    qkv: nn.Linear,
    proj: nn.Linear,
    gamma: Tensor | None,
) -> Tensor | None:
    """Return the rows ``rows`` ``(chosen, dim)`` of the tokens with the branch added; None if that wants other ways.

    Args:
        tokens: ``(total_tokens, dim)``, packed as ``layout`` says.
        rows: ``(chosen,)`` int64; None is returned for a row that comes twice.
        subset: the sequences that the branch keeps; None for all.
        gamma: ``(dim,)`` of LayerScale (arXiv 2103.17239), or None for none.
    """
    also = (norm.weight, norm.bias, *([] if gamma is None else [gamma]))
    here = frugal_attention.applies(tokens, qkv, proj, also) and tokens.shape[-1] // heads % 2 == 0
    if not (here and branches.applies(tokens, qkv, proj, also=also, parts=3) and _distinct(rows, tokens)):
        return None
    if subset is not None and not branches.Chosen(subset.rows, subset.scale, second=False).fit(tokens):
        return None
    read = read_of(rows, len(tokens), layout, subset)
    if not len(read.rows):
        return None
    layers = (norm.weight, norm.bias, qkv.weight, qkv.bias, proj.weight, proj.bias, gamma)
    out: Tensor = _ReadAttention.apply(tokens, *layers, rows, read, heads, norm.eps, frugal.keeps(qkv, proj))
    return out


def _distinct(rows: Tensor, tokens: Tensor) -> bool:
    return are_rows(rows, tokens) and len(np.unique(rows.numpy())) == len(rows)


class _ReadAttention(torch.autograd.Function):
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
        rows: Tensor,
        read: Read,
        heads: int,
        eps: float,
        keep: bool,
    ) -> Tensor:
        dim, how = tokens.shape[1], branches.how_multiplied(tokens)
        ctx.rows, ctx.read, ctx.how, ctx.heads, ctx.tokens = rows, read, how, heads, len(tokens)
        norm = (norm_weight, norm_bias)
        query, *of_queries, asking = operations.norm_linear(
            tokens, *norm, weight1[:dim], bias1[:dim], eps, how, read.rows
        )
        keys, *of_keys, taken = operations.norm_linear(tokens, *norm, weight1[dim:], bias1[dim:], eps, how, read.kept)
        attended = torch.empty_like(query)
        for some in _groups(read):
            part = (query[some.queries], keys[some.keys], some.starts, heads, how, some.pairs)
            operations.attention_of(*part, attended[some.queries])
        out = tokens.index_select(0, rows)
        operations.scaled_linear_onto(attended, weight2, bias2, gamma, asking, how, read.places, read.factors, out)
        kept = (tokens if read.kept is None else taken, asking, query, keys, attended, *of_queries, *of_keys)
        ctx.save_for_backward(norm_weight, norm_bias, weight1, weight2, bias2, gamma, *(kept if keep else ()))
        return out

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        norm_weight, norm_bias, weight1, weight2, bias2, gamma, *kept = ctx.saved_tensors
        seen, asking, query, keys, attended, *statistics = kept
        read, how, dim, norm = ctx.read, ctx.how, seen.shape[1], (norm_weight, norm_bias)
        grad = grad.to(seen.dtype).contiguous()
        of_attended, *of_second = operations.scaled_linear_backward(
            grad, attended, weight2, bias2, gamma, how, read.places, read.factors
        )
        of_query, of_keys = (torch.empty_like(part, dtype=multiplied(how)) for part in (query, keys))
        for some in _groups(read):
            part = (of_attended[some.queries], query[some.queries], keys[some.keys], some.starts, ctx.heads, how)
            operations.attention_of_backward(*part, some.pairs, of_query[some.queries], of_keys[some.keys])
        # What went past the branch, to which keys and values of all tokens, then the queries, add what they give.
        of_tokens = seen.new_zeros(ctx.tokens, dim).index_copy_(0, ctx.rows, grad)
        back = (of_tokens, how, read.kept, of_tokens)
        _, *first = operations.norm_linear_backward(of_keys, seen, *norm, weight1[dim:], *statistics[2:], *back)
        back = (of_tokens, how, read.rows, of_tokens)
        _, *second = operations.norm_linear_backward(of_query, asking, *norm, weight1[:dim], *statistics[:2], *back)
        of_norm = [one + other for one, other in zip(first[:2], second[:2], strict=True)]
        of_first = [
            torch.cat([of_queries, of_others]) for of_others, of_queries in zip(first[2:], second[2:], strict=True)
        ]
        found = (of_tokens, *of_norm, *of_first, *of_second)
        return *(part if part.numel() else None for part in found), None, None, None, None, None


@dataclass(frozen=True)
class _Group:
    """Equally long sequences: their queries, their keys, each one's first query, and the pairs that are multiplied."""

    queries: slice
    keys: slice
    starts: Tensor
    pairs: int


def _groups(read: Read) -> list[_Group]:
    found, first = [], 0
    bounds = read.starts.numpy()
    for start, end, sequences, length in read.layout.spans():
        before, after = int(bounds[first]), int(bounds[first + sequences])
        starts = read.starts[first : first + sequences + 1] - before
        found.append(_Group(slice(before, after), slice(start, end), starts, (after - before) * length))
        first += sequences
    return found


def _attention_of(
    query: Tensor, keys: Tensor, starts: Tensor, heads: int, how: int, pairs: int, target: Tensor
) -> None:
    shape = _shape(query, keys, starts, heads, pairs)
    if target.shape != query.shape or not target.dtype == query.dtype == keys.dtype or not target.is_contiguous():
        raise TypeError(f"no attention from {query.dtype} and {keys.dtype} to {target.dtype} {tuple(target.shape)}")
    how = checked(how, query.dtype, shape[-2])
    loaded().attention_of(how, query.data_ptr(), keys.data_ptr(), starts.data_ptr(), *shape, target.data_ptr())


def _attention_of_backward(
    grad: Tensor,
    query: Tensor,
    keys: Tensor,
    starts: Tensor,
    heads: int,
    how: int,
    pairs: int,
    of_query: Tensor,
    of_keys: Tensor,
) -> None:
    shape, between = _shape(query, keys, starts, heads, pairs), multiplied(how)
    fits = grad.shape == query.shape == of_query.shape and keys.shape == of_keys.shape and query.dtype == keys.dtype
    if not (fits and all(part.dtype == between and part.is_contiguous() for part in (grad, of_query, of_keys))):
        raise TypeError(f"no attention for a gradient in {grad.dtype} of {query.dtype} in {of_query.dtype}")
    how = checked(how, query.dtype, shape[-2])
    pointers = (part.data_ptr() for part in (grad, query, keys, starts))
    loaded().attention_of_backward(how, *pointers, *shape, of_query.data_ptr(), of_keys.data_ptr())


def _shape(query: Tensor, keys: Tensor, starts: Tensor, heads: int, pairs: int) -> tuple[int, int, int, int, float]:
    """Return sequences, their length, heads, their width, and what scores are multiplied by.

    Raises:
        ValueError: these do not fit together.
    """
    count, dim = query.shape
    sequences, bounds = len(starts) - 1, starts.numpy()
    length = len(keys) // sequences
    laid_out = all(part.is_contiguous() for part in (query, keys, starts))
    each = np.diff(bounds)
    ordered = bounds[0] == 0 and bounds[-1] == count and bool((each >= 0).all() and (each <= length).all())
    if not (laid_out and ordered and keys.shape == (sequences * length, 2 * dim) and dim % heads == 0):
        raise ValueError(f"{count} queries of {dim} do not fit to keys {tuple(keys.shape)} of {sequences} sequences")
    if pairs != count * length:
        raise ValueError(f"{count} queries of sequences of {length} are not {pairs} pairs")
    return sequences, length, heads, dim // heads, (dim // heads) ** -0.5


_operations = torch.library.Library("dinov2_fsdp", "FRAGMENT")
_PARTS = "Tensor query, Tensor keys, Tensor starts, int heads, int how, int pairs"
_operations.define(f"attention_of({_PARTS}, Tensor(a!) target) -> ()")
_operations.define(f"attention_of_backward(Tensor grad, {_PARTS}, Tensor(a!) of_query, Tensor(b!) of_keys) -> ()")
_operations.impl("attention_of", _attention_of, "CPU")
_operations.impl("attention_of_backward", _attention_of_backward, "CPU")


@register_flop_formula(operations.attention_of)
def _attention_of_flops(
    query: tuple[int, ...], keys: object, starts: object, heads: int, how: int, pairs: int, *_: object, **__: object
) -> int:
    return 4 * pairs * query[1]


@register_flop_formula(operations.attention_of_backward)
def _attention_of_backward_flops(
    grad: object,
    query: tuple[int, ...],
    keys: object,
    starts: object,
    heads: int,
    how: int,
    pairs: int,
    *_: object,
    **__: object,
) -> int:
    return 8 * pairs * query[1]  # without what is computed again
