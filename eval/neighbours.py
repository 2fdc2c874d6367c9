"""Search and vote of weighted k-nearest neighbours (arXiv 1805.01978, section 3.4), exact over any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize, pad

from dinov2_fsdp.errors import UserError
from eval.features import all_gather_single, reduce_over_ranks

_QUERIES_AT_ONCE = 1024
_BANK_AT_ONCE = 8192
_LARGEST_BANK_ON_DEVICE = 8 * 2**30
_NO_NEIGHBOUR = torch.iinfo(torch.int64).min
_INDEX_BITS = 32
_LARGEST_INDEX = 2**_INDEX_BITS - 1


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    ks: Sequence[int],
    temperature: float = 0.07,
    *,
    chunk: int = _BANK_AT_ONCE,
    bank_indices: Tensor | None = None,
    world_size: int = 1,
    device: torch.device | None = None,
) -> dict[int, float]:
    """Return, for each k, the percentage of queries whose class wins the vote of their k nearest neighbours.

    A neighbour of cosine similarity s votes for its class with exp(s / temperature). Among equally similar images the
    one with the smaller index is nearer, and of classes with equal votes the first wins, so that the result depends
    neither on the number of ranks nor on how the bank is shared. Memory beyond the features is bounded by
    1024 × ``chunk`` similarities; all k share one search.

    Args:
        bank: (n, D) features with ``bank_labels`` (n,); with ``world_size`` > 1 this rank's share of them.
        queries: (m, D) features with ``query_labels`` (m,); with ``world_size`` > 1 this rank's share.
        bank_indices: (n,) place of each row in the whole bank; by default 0 … n−1.
        device: where to search; by default where ``queries`` are.

    Raises:
        UserError: a k is larger than the whole bank, or there are no queries.
    """
    device = device or queries.device
    indices = torch.arange(len(bank)) if bank_indices is None else bank_indices.cpu()
    labels = labels_by_index(indices, bank_labels, world_size, device)
    size = int((labels >= 0).sum())
    ks = sorted(set(ks))
    if not ks or ks[0] < 1:
        raise UserError(f"k={list(ks)} is impossible; valid: numbers of neighbours from 1 on")
    if ks[-1] > size:
        raise UserError(f"k={ks[-1]} is larger than the memory bank of {size} images; use k of at most {size}")

    if bank.numel() * bank.element_size() <= _LARGEST_BANK_ON_DEVICE:
        bank = bank.to(device)
    indices = indices.to(device)
    per_rank = -(-_QUERIES_AT_ONCE // world_size)
    rounds = -(-int(reduce_over_ranks(torch.tensor(len(queries)), world_size, device, dist.ReduceOp.MAX)) // per_rank)
    correct = np.zeros(len(ks) + 1, np.int64)
    for number in range(rounds):
        own = slice(number * per_rank, (number + 1) * per_rank)
        keys = _nearest(
            normalize(queries[own].float(), dim=1).to(device), bank, indices, ks[-1], chunk, world_size, per_rank
        )
        similarity, neighbour = _unpack(keys)
        truth = query_labels[own].cpu().numpy()
        votes = _votes(similarity, labels[neighbour], ks, temperature)
        correct += [*((winner == truth).sum() for winner in votes), len(truth)]
    *right, total = reduce_over_ranks(torch.from_numpy(correct), world_size, device, dist.ReduceOp.SUM).tolist()
    if total == 0:
        raise UserError("there are no test images to classify")
    return {k: 100 * count / total for k, count in zip(ks, right, strict=True)}


def _nearest(
    queries: Tensor, bank: Tensor, indices: Tensor, k: int, chunk: int, world_size: int, per_rank: int
) -> Tensor:
    """Return the keys (m, k) of each query's nearest neighbours over all ranks' shares of the bank, nearest first."""
    count, dim = queries.shape[0], bank.shape[1]
    if world_size == 1:
        return _nearest_here(queries, bank, indices, k, chunk)
    mine = pad(queries.reshape(count, dim), (0, 0, 0, per_rank - count))
    everyone = mine.new_empty(world_size * per_rank, dim)
    all_gather_single(everyone, mine)
    found = torch.cat([_nearest_here(part, bank, indices, k, chunk) for part in everyone.split(_QUERIES_AT_ONCE)])
    returned = torch.empty_like(found)
    dist.all_to_all_single(returned, found)
    candidates = returned.view(world_size, per_rank, k).transpose(0, 1).reshape(per_rank, world_size * k)
    return candidates.topk(k, dim=1).values[:count]


def _nearest_here(queries: Tensor, bank: Tensor, indices: Tensor, k: int, chunk: int) -> Tensor:
    best = torch.full((len(queries), k), _NO_NEIGHBOUR, device=queries.device)
    # Every product has the same shape, however the bank is shared, so that each similarity is rounded the same way.
    padded = pad(queries, (0, 0, 0, _QUERIES_AT_ONCE - len(queries)))
    for start in range(0, len(bank), chunk):
        part = normalize(bank[start : start + chunk].to(queries.device).float(), dim=1)
        full = part if len(part) == chunk else pad(part, (0, 0, 0, chunk - len(part)))
        similarity = (padded @ full.T)[: len(queries), : len(part)]
        keys = _pack(similarity, indices[start : start + chunk])
        best = torch.cat([best, keys], dim=1).topk(k, dim=1).values
    return best


def _pack(similarity: Tensor, indices: Tensor) -> Tensor:
    """Return int64 keys that order neighbours by similarity (upper half) and then by smaller index (lower half)."""
    bits = (similarity + 0.0).view(torch.int32)
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (rising.long() << _INDEX_BITS) | (_LARGEST_INDEX - indices)


def _unpack(keys: Tensor) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rising = (keys >> _INDEX_BITS).int()
    similarity = torch.where(rising < 0, rising ^ 0x7FFFFFFF, rising).view(torch.float32)
    return similarity.cpu().numpy(), (_LARGEST_INDEX - (keys & _LARGEST_INDEX)).cpu().numpy()


def _votes(
    similarity: NDArray[np.float32], labels: NDArray[np.int64], ks: Sequence[int], temperature: float
) -> list[NDArray[np.int64]]:
    """Return the winning class (m,) for each k. On the CPU in float64: sums in one order, whatever the device."""
    count, classes = len(labels), int(labels.max(initial=0)) + 1
    # A common factor of a query's votes changes nothing; with this one exp cannot overflow.
    weights = np.exp((similarity - similarity[:, :1]).astype(np.float64) / temperature)
    flat = np.arange(count)[:, None] * classes + labels
    votes = np.zeros(count * classes)
    winners, start = [], 0
    for k in ks:
        votes += np.bincount(flat[:, start:k].ravel(), weights[:, start:k].ravel(), minlength=count * classes)
        winners.append(votes.reshape(count, classes).argmax(axis=1))
        start = k
    return winners


def labels_by_index(indices: Tensor, labels: Tensor, world_size: int, device: torch.device) -> NDArray[np.int64]:
    """Return the labels of all ranks' images by their indices, −1 where no rank has one."""
    last = reduce_over_ranks(indices.max() if len(indices) else torch.tensor(-1), world_size, device, dist.ReduceOp.MAX)
    table = torch.full((int(last) + 1,), -1)
    table[indices] = labels.cpu()
    return reduce_over_ranks(table, world_size, device, dist.ReduceOp.MAX).numpy()
