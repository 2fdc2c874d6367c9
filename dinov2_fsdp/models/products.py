"""Matrix products by the faster of the two libraries that torch brings for a CPU, and in the faster type.

In fp32 torch multiplies with MKL, which leaves the wide registers of other makers' processors unused; oneDNN uses them.
Where MKL uses them too it is faster (docs/performance.md; measured on an AMD EPYC and an Intel Xeon with AVX-512).

Where a processor is slower in bf16 than in fp32, bf16 is what lies in memory, and fp32 what is multiplied.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from dinov2_fsdp.models.fused import added, laid_out, transposed

Backward = Callable[[Any, Tensor], "tuple[Tensor | None, ...]"]

LEAST_PARTS = 4
"""Products with one weight from which on laying it out anew pays."""

FEW_ROWS = 1024
WIDENED = 2**24
"""Values of bf16 that are copied to fp32 at a time: logits are many."""

ROWS_ALIKE = 64
"""Fewer than so many rows of bf16 are filled up with zeros to a multiple of this, for oneDNN to know their shape again:
hardly two steps hide as many patches, and making a kernel takes longer than multiplying so few rows."""


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``rows · weightᵀ + bias`` for ``(rows, in)`` and ``(out, in)``, as :func:`torch.nn.functional.linear`.

    ``weight`` may be what :func:`packed` gave, which has no derivative.
    """
    if weight.is_mkldnn:
        return _by_onednn(rows, weight, bias)
    onednn, fill, wide = by_onednn(rows, weight), _to_fill(rows, weight), widens(rows, weight)
    if torch.is_grad_enabled() and (onednn or fill or wide):
        out: Tensor = _Linear.apply(rows, weight, bias)
        return out
    if wide:
        return _in_fp32(rows, weight, bias)
    if onednn:
        return _by_onednn(rows, weight, bias)
    if not fill:
        return F.linear(rows, weight, bias)
    # Not a slice: FSDP warns of outputs that are views.
    return F.linear(_filled(rows), weight, bias).resize_(len(rows), len(weight))


def linear_onto(rows: Tensor, weight: Tensor, bias: Tensor, onto: Tensor | None, target: Tensor | None) -> Tensor:
    """Return ``linear(rows, weight, bias) + onto`` without that if it is None; in ``target`` if that is given.

    Has no derivative.
    """
    if onto is None or not bias_apart(rows, weight):
        return added(linear(rows, weight, bias), onto, target)
    same = target is not None and target.dtype == rows.dtype
    out = torch.add(onto, bias, out=target if same else None).addmm_(rows, weight.t())
    return out if same or target is None else target.copy_(out)


def bias_apart(rows: Tensor, weight: Tensor) -> bool:
    """Return whether a bias takes a pass over memory of its own: MKL adds what stands in the result's place."""
    return (
        rows.dtype == torch.float32
        and rows.device.type == "cpu"
        and not weight.is_mkldnn
        and not torch.compiler.is_compiling()
        and not by_onednn(rows, weight)
    )


class Linear(nn.Linear):
    """A linear layer by :func:`linear`, for ``(…, rows, in)``."""

    def forward(self, rows: Tensor) -> Tensor:
        return linear(rows.flatten(0, -2), self.weight, self.bias).unflatten(0, rows.shape[:-1])


class _Linear(torch.autograd.Function):
    """oneDNN's product has no derivative of its own, and torch's would not be filled up. Once differentiable."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return linear(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        of_rows, of_weight, of_bias = ctx.needs_input_grad
        return (
            linear(grad, weight.t()) if of_rows else None,
            product_of_rows(grad, rows).to(weight.dtype) if of_weight else None,
            grad.sum(0) if of_bias else None,
        )


def outside_autocast(backward: Backward) -> Backward:
    """Run a backward pass under no autocast, whose forward pass was under none and multiplied accordingly."""

    @functools.wraps(backward)
    def run(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_autocast_enabled(grad.device.type):
            return backward(ctx, grad)
        with torch.autocast(grad.device.type, enabled=False):
            return backward(ctx, grad)

    return run


def product_of_rows(left: Tensor, right: Tensor) -> Tensor:
    """Return ``leftᵀ · right``, ``(m, n)``, for ``(rows, m)`` and ``(rows, n)``; has no derivative.

    In fp32 if that is what is multiplied, see :func:`widens`. oneDNN is faster with the shorter side first, and with
    that side laid out anew.
    """
    if widens(left, right):
        parts = zip(_few(left, right.shape[1]), _few(right, left.shape[1]), strict=True)
        total = product_of_rows(*(part.float() for part in next(parts)))
        for some, others in parts:
            total.addmm_(some.float().t(), others.float())
        return total
    if by_onednn(left, right):
        return _by_onednn(transposed(left), right.t())
    if _to_fill(left, right):
        left, right = _filled(left), _filled(right)
    return left.t() @ right


def bmm(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left · right`` for batches ``(b, m, k)`` and ``(b, k, n)``, as :func:`torch.bmm`; has no derivative.

    oneDNN's only way to batches of fp32 matrices in torch is a convolution by one pixel, a group for each matrix.
    """
    if widens(left, right):
        return bmm(left.float(), right.float()).to(left.dtype)
    batch, rows, inner = left.shape
    if not by_onednn(left[0], right[0]):
        return torch.bmm(left, right)
    columns = right.shape[2]
    image, weight = laid_out(right).view(1, batch * inner, columns), laid_out(left).view(batch * rows, inner, 1)
    out = torch.conv1d(image, weight, groups=batch)
    return out.view(batch, rows, columns)


def packed(weight: Tensor, parts: int) -> Tensor:
    """Return ``weight``, ``(out, in)``, for as many products as there are parts: laid out for them once if that pays.

    The result may be opaque: it is for :func:`linear` alone. A backward pass gains nothing: its weights are transposed,
    which is as fast as it is, and slow to lay out.
    """
    if parts < LEAST_PARTS or torch.is_grad_enabled() or isinstance(weight, FakeTensor) or not _may_multiply(weight):
        return weight
    if not (
        _fp32_by_onednn()
        if weight.dtype == torch.float32
        else weight.dtype == torch.bfloat16 and _knows_bf16() and bf16_is_fast()
    ):
        return weight
    out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return out


def widens(*tensors: Tensor) -> bool:
    """Return whether these are bf16 matrices which this processor multiplies faster as fp32.

    Where Linux says what the processor can, that is every x86 processor without AMX, and without another maker's
    AVX-512 instructions for bf16: Intel's take twice as long as those for fp32, and without any it is done by shifts
    (docs/performance.md).
    """
    return all(
        tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor)
        for tensor in tensors
    ) and not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or bf16_is_fast())


def _in_fp32(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    weight, bias = weight.float(), None if bias is None else bias.float()
    found = [linear(some.float(), weight, bias).to(rows.dtype) for some in _few(rows, len(weight))]
    return found[0] if len(found) == 1 else torch.cat(found)


def _few(rows: Tensor, other_width: int) -> tuple[Tensor, ...]:
    """Return the rows in parts of which neither these nor what is as wide as ``other_width`` are many values."""
    return rows.split(max(1, WIDENED // max(1, rows.shape[1], other_width)))


def widened(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in the type in which it is multiplied, see :func:`widens`."""
    return tensor.float() if widens(tensor) else tensor


def by_onednn(rows: Tensor, weight: Tensor) -> bool:
    """Return whether :func:`linear` multiplies these by oneDNN as they are."""
    return (
        rows.dtype == weight.dtype == torch.float32
        and rows.dim() == 2
        and rows.numel() > 0
        and rows.shape[1] == weight.shape[-1]  # what does not fit together is for torch to refuse
        and not torch.is_autocast_enabled(rows.device.type)
        and _may_multiply(weight)
        and _fp32_by_onednn()
    )


def _to_fill(rows: Tensor, other: Tensor) -> bool:
    return (
        rows.dtype == other.dtype == torch.bfloat16
        and rows.dim() == 2
        and 0 < len(rows) < FEW_ROWS
        and len(rows) % ROWS_ALIKE > 0
        and not torch.is_autocast_enabled(rows.device.type)
        and not isinstance(rows, FakeTensor)
        and _may_multiply(other)
        and _knows_bf16()
        and not widens(rows)
    )


def _filled(rows: Tensor) -> Tensor:
    return F.pad(rows, (0, 0, 0, -len(rows) % ROWS_ALIKE))


def _by_onednn(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return out


def _may_multiply(weight: Tensor) -> bool:
    return bool(
        not torch.compiler.is_compiling()
        and weight.device.type == "cpu"
        and torch.backends.mkldnn.enabled
        and _has_onednn()
    )


@functools.cache
def _knows_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _fp32_by_onednn() -> bool:
    """Return whether MKL is not the better choice: it has wide kernels for processors of its own maker alone."""
    return processor_maker() != "GenuineIntel" or not torch.backends.mkl.is_available()


@functools.cache
def bf16_is_fast() -> bool:
    """Return whether this machine has instructions for products in bf16 that beat those for fp32.

    True where the processor does not say: torch then knows better than this.
    """
    flags = _processor("flags").split()  # what x86 calls them; other processors have no such line
    return not flags or "amx_bf16" in flags or ("avx512_bf16" in flags and processor_maker() != "GenuineIntel")


def processor_maker() -> str:
    """Return what this machine's processor says its maker is, as ``GenuineIntel``; empty where it does not say."""
    return _processor("vendor_id") or ("GenuineIntel" if "GenuineIntel" in platform.processor() else "")


@functools.cache
def _processor(key: str) -> str:
    """Return what Linux says of this machine's first processor, empty where it says nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    found = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in found if name.strip() == key), "")


@functools.cache
def _has_onednn() -> bool:
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
