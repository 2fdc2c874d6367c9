"""Matrix products by the faster of the two libraries that torch brings for a CPU.

In fp32 torch multiplies with MKL, which leaves the wide registers of other makers' processors unused; oneDNN uses them
(docs/performance.md; measured on an AMD EPYC alone, and chosen wherever there is AVX-512).
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

LEAST_PARTS = 4
"""Products with one weight from which on laying it out anew pays."""


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``rows · weightᵀ + bias`` for ``(rows, in)`` and ``(out, in)``, as :func:`torch.nn.functional.linear`.

    ``weight`` may be what :func:`packed` gave.
    """
    if weight.is_mkldnn or by_onednn(rows, weight):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
        return out
    return F.linear(rows, weight, bias)


def packed(weight: Tensor, parts: int) -> Tensor:
    """Return ``weight``, ``(out, in)``, for as many products as there are parts: laid out for them once if that pays.

    The result may be opaque: it is for :func:`linear` alone. A backward pass gains nothing: its weights are transposed,
    which is as fast as it is, and slow to lay out.
    """
    if parts < LEAST_PARTS or not _may_multiply(weight) or isinstance(weight, FakeTensor):
        return weight
    if weight.dtype != torch.float32 and not (weight.dtype == torch.bfloat16 and _knows_bf16()):
        return weight
    out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return out


def by_onednn(rows: Tensor, weight: Tensor) -> bool:
    """Return whether :func:`linear` multiplies these by oneDNN as they are."""
    return (
        rows.dtype == weight.dtype == torch.float32 and rows.dim() == 2 and rows.numel() > 0 and _may_multiply(weight)
    )


def _may_multiply(weight: Tensor) -> bool:
    return bool(
        not torch.compiler.is_compiling()
        and weight.device.type == "cpu"
        and torch.backends.mkldnn.enabled
        and _has_onednn()
        # It has no derivative: it is for what brings its own.
        and not torch.is_grad_enabled()
    )


@functools.cache
def _knows_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.cache
def _has_onednn() -> bool:
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
