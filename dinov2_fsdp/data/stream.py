"""Which images make up a step: arithmetic on (seed, step), so that a run can start anywhere at no cost.

The stream is endless. Position ``p`` of the stream belongs to step ``p // batch``; epoch ``p // n`` runs through all
``n`` images once, in an order of its own. The order is a keyed permutation that is computed, not stored.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dinov2_fsdp.rng import generator

FEISTEL_ROUNDS = 6
_U64 = np.uint64


def permute(indices: NDArray[np.int64], length: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return where the epoch's permutation of ``range(length)`` sends ``indices``.

    A Feistel network over the next even number of bits (Luby and Rackoff, 1988), walked until it lands inside the
    range (cycle walking, Black and Rogaway, 2002).
    """
    if length == 1:
        return np.zeros_like(indices)
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    keys = generator(seed, "order", epoch).integers(2**63, size=FEISTEL_ROUNDS).astype(_U64)
    values = _feistel(indices.astype(_U64), half, keys)
    while (outside := values >= _U64(length)).any():
        values[outside] = _feistel(values[outside], half, keys)
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mask, shift = _U64((1 << half) - 1), _U64(half)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a good hash of 64-bit numbers: the finaliser of splitmix64 (Steele et al., 2014)."""
    values = (values ^ (values >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> _U64(27))) * _U64(0x94D049BB133111EB)
    return values ^ (values >> _U64(31))


class Stream:
    """The endless, seeded sequence of images that all ranks draw from.

    Args:
        seed: of the run. images: in the data set. batch: images per step, over all ranks.
    """

    def __init__(self, seed: int, images: int, batch: int) -> None:
        self.seed, self.images, self.batch = seed, images, batch

    def samples(self, step: int, start: int, count: int) -> NDArray[np.int64]:
        """Return the data set indices at places ``start … start + count − 1`` of a step's batch."""
        positions = step * self.batch + start + np.arange(count, dtype=np.int64)
        epochs = positions // self.images
        result = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            result[chosen] = permute(positions[chosen] % self.images, self.images, self.seed, int(epoch))
        return result

    def replacement(self, step: int, place: int, attempt: int) -> int:
        """Return the index that stands in, at the ``attempt``-th try, for an unreadable image."""
        return int(generator(self.seed, "replacement", step, place, attempt).integers(self.images))
