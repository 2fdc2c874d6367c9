"""Matrix products by the faster of the two libraries that torch brings for a CPU.

In fp32 torch multiplies with MKL, which leaves the wide registers of other makers' processors unused; oneDNN uses them
(docs/performance.md; measured on an AMD EPYC alone, and chosen wherever there is AVX-512).
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``rows · weightᵀ + bias`` for ``(rows, in)`` and ``(out, in)``, as :func:`torch.nn.functional.linear`."""
    if by_onednn(rows, weight):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
        return out
    return F.linear(rows, weight, bias)


def by_onednn(rows: Tensor, weight: Tensor) -> bool:
    """Return whether :func:`linear` multiplies these by oneDNN."""
    return bool(
        not torch.compiler.is_compiling()
        and rows.device.type == "cpu"
        and rows.dtype == weight.dtype == torch.float32
        and rows.dim() == 2
        and rows.numel() > 0
        and torch.backends.mkldnn.enabled
        and _has_onednn()
        # It has no derivative: it is for what brings its own.
        and not torch.is_grad_enabled()
    )


@functools.cache
def _has_onednn() -> bool:
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
