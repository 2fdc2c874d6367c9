"""Norms of sharded tensors that do not depend on the sharding, and gradient clipping by them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dinov2_fsdp.native import is_row_of_fp32, parallel_library


def local_shard(tensor: Tensor) -> Tensor:
    """Return the part of ``tensor`` that this rank holds, sharing its memory; a plain tensor is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def square_sums(shards: Sequence[Tensor], layouts: Sequence[Tensor]) -> Tensor:
    """Return the sum of squares of every whole tensor, float64, shape (len(shards),), equal on all ranks.

    ``shards`` are what this rank holds of tensors that are sharded like ``layouts`` (DTensors, or plain tensors, which
    are not shared with anyone). Tensors of one layout cost one all-reduce together, and only over the mesh dimensions
    that shard: replicas count once. Raises ValueError for a partial DTensor, whose squares cannot be added.

    Float64, because how float32 squares round depends on where the tensors are cut. In float64 the order of summation
    is worth about 1e-15, which a norm rounded to float32 shows about once in 1e7 steps.
    """
    sums = _local_square_sums(shards)  # a list: indexing a tensor by positions would wait for the device
    by_layout: dict[tuple[DeviceMesh, tuple[int, ...]], list[int]] = {}
    for index, layout in enumerate(layouts):
        if isinstance(layout, DTensor):
            mesh = layout.device_mesh
            dims = tuple(d for d, p in enumerate(layout.placements) if not p.is_replicate() and mesh.size(d) > 1)
            if any(placement.is_partial() for placement in layout.placements):
                raise ValueError(f"a gradient with placements {layout.placements} is not reduced yet: it has no norm")
            if dims:
                by_layout.setdefault((mesh, dims), []).append(index)
    for (mesh, dims), indices in by_layout.items():
        bucket = torch.stack([sums[index] for index in indices])
        for dim in dims:
            dist.all_reduce(bucket, group=mesh.get_group(dim))
        for index, total in zip(indices, bucket.unbind(), strict=True):
            sums[index] = total
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.float64)


def _local_square_sums(shards: Sequence[Tensor]) -> list[Tensor]:
    """Return one float64 scalar for each shard; a small parameter may have no row on this rank."""
    library = parallel_library()
    if library is not None and all(map(is_row_of_fp32, shards)):
        sums = torch.zeros(len(shards), dtype=torch.float64)
        for index, shard in enumerate(shards):
            library.square_sum(shard.data_ptr(), shard.numel(), sums.data_ptr() + index * sums.itemsize)
        return list(sums.unbind())
    filled = [shard.detach() for shard in shards if shard.numel() > 0]
    norms = iter(torch._foreach_norm(filled, 2, dtype=torch.float64) if filled else ())
    return [next(norms).square() if shard.numel() > 0 else shard.new_zeros((), dtype=torch.float64) for shard in shards]


@torch.no_grad()
def gradient_norms(grads_by_part: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """Return the L2 norm of each part's whole gradient, float32 scalars on the gradients' device, equal on all ranks.

    Costs one all-reduce for all parts where they share a mesh, none for plain tensors, and no host sync. One NaN or inf
    on one rank makes the norm of its part non-finite on every rank.
    """
    grads = [grad for part in grads_by_part.values() for grad in part]
    sums = square_sums([local_shard(grad) for grad in grads], grads)
    per_part = sums.split([len(part) for part in grads_by_part.values()]) if grads_by_part else ()
    return {name: part.sum().sqrt().float() for name, part in zip(grads_by_part, per_part, strict=True)}


@torch.no_grad()
def clip_(grads_by_part: Mapping[str, Sequence[Tensor]], norms: Mapping[str, Tensor], max_norm: float) -> None:
    """Scale each part's gradients in place by min(1, max_norm / (norm + 1e-6)), without a host sync.

    ``norms`` are as :func:`gradient_norms` returns them; where the gradients still carry a loss scale, divide the norms
    by it first, so that ``max_norm`` means the same with and without. A part with a non-finite norm is left as it is:
    such a step is skipped, and scaling by 0 would hide an inf as NaN.
    """
    if not (max_norm > 0 and math.isfinite(max_norm)):
        raise ValueError(f"max_norm must be positive and finite, not {max_norm}")
    for name, grads in grads_by_part.items():
        shards = [local_shard(grad) for grad in grads]
        if shards:
            norm = norms[name]
            factor = torch.where(norm.isfinite(), (max_norm / (norm + 1e-6)).clamp(max=1.0), 1.0)
            torch._foreach_mul_(shards, factor)
