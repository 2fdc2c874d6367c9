"""What stands between the matrix products of a block, each in one pass over memory where compiled code is at hand.

On a CPU torch goes through memory once for every operation: GELU, its gradient and the sum of that for a bias are three
passes, laying out a matrix anew an unordered one. Compiled code (:mod:`dinov2_fsdp.native`) takes one, in single
precision whatever the type. Elsewhere, and for anything but plain fp32 and bf16 tensors, torch does the same. Nothing
here has a derivative.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dinov2_fsdp.native import Library, has_memory, parallel_library

_LEAST = 4096
"""Fewer values than that are not worth the way around torch."""


def gelu(hidden: Tensor, bias: Tensor | None, keep: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """Return GELU (arXiv 1606.08415, not its approximations) of ``hidden + bias``, and that sum in the type ``keep``.

    Args:
        hidden: ``(rows, width)``, which may be overwritten, and may be what is returned as kept.
        bias: ``(width,)``, None for none.
        keep: fp32 or bf16; None if only the activation is wanted.
    """
    # In bf16 torch's is as fast.
    library = None if hidden.dtype != torch.float32 else _library(hidden, *([] if bias is None else [bias]), dim=2)
    if library is None or keep not in (None, torch.float32, torch.bfloat16):
        hidden = hidden if bias is None else hidden.add_(bias)
        return F.gelu(hidden), None if keep is None else hidden.to(keep)
    # One of the two results takes the place of what is given: the one of its type.
    own_place = keep == torch.float32
    out = torch.empty_like(hidden) if own_place else hidden
    kept = hidden if own_place else None if keep is None else torch.empty_like(hidden, dtype=keep)
    write = kept is not None and not (own_place and bias is None)
    pointers = (hidden.data_ptr(), None if bias is None else bias.data_ptr())
    target = kept.data_ptr() if kept is not None and write else None
    library.gelu(int(keep == torch.bfloat16), *pointers, *hidden.shape, target, out.data_ptr())
    return out, kept


def gelu_backward(of_activated: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient in ``hidden`` ``(rows, width)``, its sum over rows ``(width,)``, and GELU of ``hidden``.

    The first takes the place of ``of_activated``; the second is in fp32 if compiled. ``hidden`` may be bf16 where the
    rest is fp32. Three tensors at a time: where they are large and nothing is compiled, one after the other takes less
    memory, see :func:`compiled`.
    """
    library = _library(of_activated, dim=2) if _library(hidden, dim=2) else None
    if hidden.dtype != of_activated.dtype and hidden.dtype != torch.bfloat16:
        library = None
    if library is None:
        hidden = hidden.to(of_activated.dtype)
        activated = F.gelu(hidden)
        of_hidden: Tensor = torch.ops.aten.gelu_backward.grad_input(of_activated, hidden, grad_input=of_activated)
        return of_hidden, of_hidden.sum(0), activated
    activated, total = torch.empty_like(of_activated), fp32(hidden.shape[1])
    pointers = (hidden.data_ptr(), of_activated.data_ptr(), activated.data_ptr())
    library.gelu_backward(_half(hidden), _half(of_activated), *pointers, *hidden.shape, total.data_ptr())
    return of_activated, total, activated


def sum_rows(rows: Tensor) -> Tensor:
    """Return the sum of ``(rows, width)`` over rows, ``(width,)``, in fp32 if compiled, in the rows' type if not."""
    library = _library(rows, dim=2)
    if library is None:
        return rows.sum(0)
    total = fp32(rows.shape[1])
    library.sum_rows(_half(rows), rows.data_ptr(), *rows.shape, total.data_ptr())
    return total


def layer_norm(rows: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the norm of ``(rows, dim)`` and what its backward pass needs: mean and scale of each row."""
    library = _library(rows, weight, bias, dim=2)
    if library is None:
        out: tuple[Tensor, Tensor, Tensor] = torch.native_layer_norm(rows, [rows.shape[-1]], weight, bias, eps)
        return out
    normed, (mean, scale) = torch.empty_like(rows), fp32(2, len(rows))
    pointers = (rows.data_ptr(), weight.data_ptr(), bias.data_ptr())
    targets = (normed.data_ptr(), mean.data_ptr(), scale.data_ptr())
    library.norm(_half(rows), *pointers, eps, *rows.shape, *targets)
    return normed, mean, scale


def layer_norm_backward(
    grad: Tensor,
    rows: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    onto: Tensor | None = None,
    target: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients in ``rows``, ``weight`` and ``bias``; the latter two in fp32 if compiled.

    Args:
        onto: added to the first, which is written to ``target`` if that is given.
    """
    if target is not None and target.dtype != rows.dtype:
        of_rows, of_weight, of_bias = layer_norm_backward(grad, rows, mean, scale, weight, bias, onto)
        return target.copy_(of_rows), of_weight, of_bias
    given = [tensor for tensor in (onto, target) if tensor is not None]
    statistics = mean.dtype == scale.dtype == torch.float32 and mean.is_contiguous() and scale.is_contiguous()
    library = _library(grad, rows, weight, *given, dim=2) if statistics else None
    if library is None:
        shape, all_three = [rows.shape[-1]], [True, True, True]
        if rows.device.type == "cpu":  # where torch wants them in the weight's type, which compiled code does not give
            mean, scale = mean.view(-1, 1).to(weight.dtype), scale.view(-1, 1).to(weight.dtype)
        of_rows, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
            grad, rows, shape, mean, scale, weight, bias, all_three
        )
        return added(of_rows, onto, target), of_weight, of_bias
    of_rows = torch.empty_like(rows) if target is None else target
    totals = fp32(2, rows.shape[1])
    pointers = [grad.data_ptr(), rows.data_ptr(), mean.data_ptr(), scale.data_ptr(), weight.data_ptr()]
    pointers.append(0 if onto is None else onto.data_ptr())
    library.norm_backward(_half(rows), *pointers, *rows.shape, of_rows.data_ptr(), totals.data_ptr())
    return of_rows, totals[0], totals[1].clone()


def added(part: Tensor, onto: Tensor | None, target: Tensor | None) -> Tensor:
    """Return ``part``, which may be overwritten, with ``onto`` added if given; in ``target`` if that is given."""
    if target is None and onto is not None:
        # torch 2.11 loses what is added in place to a gradient that it compiles.
        return part + onto if torch.compiler.is_compiling() else part.add_(onto)
    if target is None:
        return part
    return target.copy_(part) if onto is None else torch.add(part, onto, out=target)


def softmax(scores: Tensor, out: Tensor | None = None) -> Tensor:
    """Return softmax over the last dimension, in the place of ``scores`` unless ``out`` is given."""
    out = scores if out is None else out
    library = _library(scores, out)
    if library is None or scores.shape[-1] > library.widest_row:
        return torch.softmax(scores, dim=-1, out=out)
    columns = scores.shape[-1]
    library.softmax(_half(scores), scores.data_ptr(), out.data_ptr(), scores.numel() // columns, columns)
    return out


def softmax_backward(of_weights: Tensor, weights: Tensor) -> Tensor:
    """Return the gradient in the scores from that in ``weights``, their softmax; ``of_weights`` may be overwritten."""
    # In bf16 torch's is as fast.
    if weights.dtype != torch.float32 or not (library := _library(of_weights, weights)):
        return torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
    columns = weights.shape[-1]
    library.softmax_backward(of_weights.data_ptr(), weights.data_ptr(), weights.numel() // columns, columns)
    return of_weights


def attention_compiled(qkv: Tensor) -> bool:
    """Return whether :func:`attention` can be had for tensors like this one: in fp32, with AVX-512."""
    library = _library(qkv, dim=4)
    return library is not None and library.has_branches and qkv.dtype == torch.float32


BY_FP32, WIDENED, BY_BF16 = 0, 1, 2
"""How compiled products multiply: fp32; bf16 as fp32; bf16, if the library says that it does."""


def multiplied(how: int) -> torch.dtype:
    """Return the type that is multiplied, see :data:`BY_FP32`."""
    return torch.bfloat16 if how == BY_BF16 else torch.float32


def attention(qkv: Tensor, sequences: int, how: int, target: Tensor) -> Tensor:
    """Write softmax(q·kᵀ/√d)·v for ``(sequences · length, 3, heads, dim)`` to ``target``, and return that.

    The target is ``(sequences · length, heads · dim)``. Both have one type, fp32 or bf16, multiplied as ``how`` says
    (:data:`BY_FP32`). Ask :func:`compiled` first.
    """
    torch.ops.dinov2_fsdp.attention(qkv, sequences, how, target)
    return target


def attention_backward(grad: Tensor, qkv: Tensor, sequences: int, how: int, target: Tensor) -> Tensor:
    """Write the gradient in ``qkv``, see :func:`attention`, from that in its result to ``target``.

    Both are of the type that is multiplied (:func:`multiplied`). The softmax weights are computed again.
    """
    torch.ops.dinov2_fsdp.attention_backward(grad.to(target.dtype).contiguous(), qkv, sequences, how, target)
    return target


def _attention(qkv: Tensor, sequences: int, how: int, target: Tensor) -> None:
    rows, _, heads, dim = qkv.shape
    fits = target.shape == (rows, heads * dim) and target.dtype == qkv.dtype
    if not (fits and qkv.is_contiguous() and target.is_contiguous()):
        raise TypeError(f"no attention from {qkv.dtype} to {target.dtype} of shape {tuple(target.shape)}")
    how = checked(how, qkv.dtype, qkv.shape[-1])
    shape = (sequences, rows // sequences, heads, dim, dim**-0.5)
    loaded().attention(how, qkv.data_ptr(), *shape, target.data_ptr())


def _attention_backward(grad: Tensor, qkv: Tensor, sequences: int, how: int, target: Tensor) -> None:
    rows, _, heads, dim = qkv.shape
    how = checked(how, qkv.dtype, qkv.shape[-1])
    fits = target.shape == qkv.shape and all(tensor.is_contiguous() for tensor in (grad, qkv, target))
    if not (fits and grad.dtype == target.dtype == multiplied(how) and grad.shape == (rows, heads * dim)):
        raise TypeError(f"no attention for a gradient in {grad.dtype} of {qkv.dtype} in {target.dtype}")
    shape = (sequences, rows // sequences, heads, dim, dim**-0.5)
    loaded().attention_backward(how, grad.data_ptr(), qkv.data_ptr(), *shape, target.data_ptr())


def checked(how: int, dtype: torch.dtype, dim: int) -> int:
    """Return how heads of this type and width are multiplied.

    Raises:
        TypeError: that is not for this type or width, or not in this library.
    """
    if (how == BY_FP32) != (dtype == torch.float32) or (
        how == BY_BF16 and (dim % 2 or not loaded().multiplies_bf16)  # an odd width has no pairs
    ):
        raise TypeError(f"{dtype} is not multiplied like this here: {how}")
    return how


def loaded() -> Library:
    """Return the compiled code, where it is known that there is some."""
    library = parallel_library()
    if library is None:
        raise RuntimeError("nothing was compiled for this processor")
    return library


# Operations of torch's, for whatever looks at them: what they multiply is counted.
_operations = torch.library.Library("dinov2_fsdp", "DEF")
_operations.define("attention(Tensor qkv, int sequences, int how, Tensor(a!) target) -> ()")
_operations.define("attention_backward(Tensor grad, Tensor qkv, int sequences, int how, Tensor(a!) target) -> ()")
_operations.impl("attention", _attention, "CPU")
_operations.impl("attention_backward", _attention_backward, "CPU")


@register_flop_formula(torch.ops.dinov2_fsdp.attention)
def _attention_flops(qkv: tuple[int, ...], sequences: int, *_: object, **__: object) -> int:
    rows, _three, heads, dim = qkv
    return 4 * rows * (rows // sequences) * heads * dim


@register_flop_formula(torch.ops.dinov2_fsdp.attention_backward)
def _attention_backward_flops(grad: object, qkv: tuple[int, ...], sequences: int, *_: object, **__: object) -> int:
    return 2 * _attention_flops(qkv, sequences)  # without what is computed again


def split_heads(packed: Tensor, sequences: int, factor: float | None = None) -> Tensor:
    """Return ``(parts, sequences · heads, length, dim)`` of ``(sequences · length, parts, heads, dim)``.

    ``factor``: what the first part is multiplied by.
    """
    rows, parts, heads, dim = packed.shape
    library = _library(packed, dim=4)
    if library is None:
        out = by_head(packed, sequences).clone(memory_format=torch.contiguous_format).flatten(1, 2)
        if factor is not None:
            # Not on the way: arithmetic between tensors of different strides takes three times as long as copying.
            out[0].mul_(factor)
        return out
    length = rows // sequences
    out = packed.new_empty(parts, sequences * heads, length, dim)
    shape = (sequences, length, parts, heads, dim)
    library.split_heads(_half(packed), packed.data_ptr(), *shape, 1.0 if factor is None else factor, out.data_ptr())
    return out


def join_heads(found: Tensor, sequences: int, target: Tensor, factor: float | None = None) -> Tensor:
    """Write ``(sequences · heads, length, dim) · factor`` into ``target``, ``(sequences · length, heads, dim)``.

    ``found`` may be a transposed view, and overwritten; ``target`` may lie in wider rows. Returns the target.
    """
    rows, heads, dim = target.shape
    # As it lies in memory.
    turned = not found.is_contiguous() and found.transpose(1, 2).is_contiguous()
    lies = found.transpose(1, 2) if turned else found
    joined = target.stride()[1:] == (dim, 1) and target.dtype == found.dtype and has_memory(target)
    library = _library(lies, dim=3) if joined and (factor is None or not turned) else None
    if library is None:
        scaled = found if factor is None else found.mul_(factor)
        by_head(target[:, None], sequences)[0].copy_(scaled.unflatten(0, (sequences, heads)))
        return target
    shape = (sequences, rows // sequences, heads, dim)
    how = (target.stride(0), 1.0 if factor is None else factor, int(turned))
    library.join_heads(_half(found), lies.data_ptr(), *shape, *how, target.data_ptr())
    return target


def by_head(packed: Tensor, sequences: int) -> Tensor:
    """Return a view ``(parts, sequences, heads, length, dim)`` of ``(sequences · length, parts, heads, dim)``."""
    return packed.unflatten(0, (sequences, -1)).permute(2, 0, 3, 1, 4)


def transposed(matrix: Tensor) -> Tensor:
    """Return the transposed of ``(rows, columns)`` or of a batch of such, laid out anew."""
    library = _library(matrix, dim=max(2, min(3, matrix.dim())))
    if library is None:
        return matrix.mT.contiguous()
    *batch, rows, columns = matrix.shape
    out = matrix.new_empty(*batch, columns, rows)
    library.transpose(_half(matrix), matrix.data_ptr(), batch[0] if batch else 1, rows, columns, out.data_ptr())
    return out


def laid_out(matrices: Tensor) -> Tensor:
    """Return ``(batch, rows, columns)``, which may be a transposed view, so that it is none."""
    if matrices.is_contiguous():
        return matrices
    return transposed(matrices.mT) if matrices.mT.is_contiguous() else matrices.contiguous()


def take_rows(tensor: Tensor, rows: Tensor, factors: Tensor | None = None) -> Tensor:
    """Return the rows ``rows`` (int64) of a matrix, times ``factors`` ``(len(rows), 1)`` of its type if given."""
    library = _library(tensor, dim=2)
    if library is None or not are_rows(rows, tensor):
        taken = tensor.index_select(0, rows)
        return taken if factors is None else taken.mul_(factors)
    out, by = tensor.new_empty(len(rows), tensor.shape[1]), _factors(factors)
    arguments = (tensor.data_ptr(), tensor.shape[1], rows.data_ptr(), len(rows), None if by is None else by.data_ptr())
    library.take_rows(_half(tensor), *arguments, out.data_ptr())
    return out


def add_to_rows(base: Tensor, rows: Tensor, added: Tensor, factors: Tensor | None = None) -> Tensor:
    """Return ``base`` ``(n, dim)`` with ``added · factors`` added to its rows ``rows``, which are distinct."""
    library = _library(base, added, dim=2)
    if library is None or not are_rows(rows, base) or added.shape != (len(rows), base.shape[1]):
        kept = base.index_select(0, rows)
        # Copying the sums in place of adding at an index gives the same values without atomics.
        return base.index_copy(0, rows, kept + added if factors is None else torch.addcmul(kept, added, factors))
    out, by = torch.empty_like(base), _factors(factors)
    arguments = (base.data_ptr(), *base.shape, rows.data_ptr(), len(rows), added.data_ptr())
    library.add_to_rows(_half(base), *arguments, None if by is None else by.data_ptr(), out.data_ptr())
    return out


def are_rows(rows: Tensor, matrix: Tensor) -> bool:
    """Return whether compiled code can follow these indices; torch says what is wrong with others."""
    if not (has_memory(rows) and rows.dtype == torch.int64 and rows.is_contiguous() and len(rows)):
        return False
    indices = rows.numpy()  # to read a number by torch counts as waiting for a device
    return bool(indices.min() >= 0 and indices.max() < len(matrix))


def _factors(factors: Tensor | None) -> Tensor | None:
    return None if factors is None else factors.float().contiguous()


def compiled(*tensors: Tensor) -> bool:
    """Return whether compiled code takes tensors like these."""
    return _library(*tensors) is not None


def _library(*tensors: Tensor, dim: int | None = None) -> Library | None:
    """Return the compiled code if it can take all of these, which then have one type, and enough values.

    ``dim``: how many dimensions the first has to have.
    """
    first = tensors[0]
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if first.device.type != "cpu" or first.numel() < _LEAST or dim not in (None, first.dim()):
        return None
    same = all(has_memory(tensor) and tensor.dtype == first.dtype and tensor.is_contiguous() for tensor in tensors)
    return parallel_library() if same and first.dtype in (torch.float32, torch.bfloat16) else None


def fp32(*shape: int) -> Tensor:
    """Return memory that compiled code writes fp32 to, whatever torch's default type and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _half(tensor: Tensor) -> int:
    return int(tensor.dtype == torch.bfloat16)
