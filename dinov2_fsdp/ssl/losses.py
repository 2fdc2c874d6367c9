"""The three losses. Logits may come in any precision; all sums are taken in float32.

``B`` images, ``C`` crops of each (two global ones first), ``K`` prototypes; crops are crop-major: row ``c·B + i``
is crop ``c`` of image ``i``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = {"cpu": 2**18, "cuda": 2**25}
"""Logits that are looked at in float32 at a time: what fits a CPU's cache, or little of a GPU's memory."""


def cross_entropy(logits: Tensor, targets: Tensor, temperature: float, mass: float = 1.0) -> Tensor:
    """Return −Σₖ targetₖ · log softmax(logits/temperature)ₖ for every row: ``(rows,)`` float32.

    ``mass`` is what each row of ``targets`` sums to. As it is known, log-softmax need not be materialised:
    ``mass · logsumexp(z) − Σₖ targetₖ · zₖ``. Gradients flow into the logits alone.
    """
    out: Tensor = _CrossEntropy.apply(logits, temperature, (mass,), targets)
    return out


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropies of blocks of rows, each block with targets and mass of its own.

    Logits are kept as they come; float32 copies, softmax and gradient exist for :data:`CHUNK` logits at a time.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, temperature: float, masses: tuple[float, ...], *targets: Tensor) -> Tensor:
        if sum(map(len, targets)) != len(logits):
            raise ValueError(f"{len(logits)} rows of logits for targets of {sum(map(len, targets))}")
        out, sums = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
        for rows, target, mass in _blocks(masses, targets):
            scaled = logits[rows].float() / temperature
            sums[rows] = scaled.logsumexp(dim=-1)
            out[rows] = mass * sums[rows] - scaled.mul_(target).sum(dim=-1)
            del scaled
        ctx.temperature, ctx.masses = temperature, masses
        ctx.save_for_backward(logits, sums, *targets)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, sums, *targets = ctx.saved_tensors
        of_logits, factors = torch.empty_like(logits), (grad / ctx.temperature).unsqueeze(1)
        for rows, target, mass in _blocks(ctx.masses, targets):
            # Without a name, so that it is gone before the next is made.
            of_logits[rows] = (
                (logits[rows].float() / ctx.temperature)
                .sub_(sums[rows].unsqueeze(1))
                .exp_()
                .mul_(mass)
                .sub_(target)
                .mul_(factors[rows])
            )
        return of_logits, None, None, *(None for _ in targets)


def _blocks(masses: Sequence[float], targets: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor, float]]:
    """Yield (rows of the logits, their targets, the targets' mass), a few rows at a time."""
    start = 0
    for target, mass in zip(targets, masses, strict=True):
        for few in _few(target):
            part = target[few]
            yield slice(start + few.start, start + few.start + len(part)), part, mass
        start += len(target)


def dino_loss(logits: Tensor, targets: Tensor, images: int, temperature: float) -> Tensor:
    """Return DINO's loss (arXiv 2104.14294, eq. 3): a mean over crop pairs and images.

    ::

        loss = mean over i, over teacher crops t in {0, 1}, over student crops s ≠ t of
               −Σₖ targets[t, i, k] · log softmax(logits[s, i] / temperature)[k]

    Args:
        logits: ``(C·B, K)`` of the student. targets: ``(2·B, K)`` probabilities of the teacher. images: ``B``.
    """
    local_crops = logits.shape[0] // images - 2
    first, second = targets[:images], targets[images:]
    # A global crop is held against the other one; a local crop against both, whose cross-entropies add up.
    held_against = [second, first, *[first + second] * local_crops]
    masses = (1.0, 1.0, *[2.0] * local_crops)
    total = _CrossEntropy.apply(logits, temperature, masses, *held_against).sum()
    terms = 2 + 2 * local_crops
    return total / (terms * images)


def ibot_loss(logits: Tensor, targets: Tensor, weights: Tensor, global_crops: int, temperature: float) -> Tensor:
    """Return iBOT's loss on masked patches (arXiv 2111.07832, eq. 2), each masked crop weighing the same.

    ::

        loss = 1/(2B) · Σ over masked patches p of cross_entropy(p) / (masked patches of p's crop)

    Args:
        logits, targets: ``(masked, K)``. weights: ``(masked,)``, one over the masked patches of the patch's crop.
        global_crops: ``2·B``, the unmasked ones included.

    No masked patch gives 0, with zero gradients.
    """
    return (cross_entropy(logits, targets, temperature) * weights).sum() / global_crops


def koleo_loss(cls: Tensor, images: int, across_ranks: bool = False, eps: float = 1e-8) -> Tensor:
    """Return the Kozachenko–Leonenko regulariser (arXiv 1806.03198; DINOv2, section 4), each global crop apart.

    ::

        x = cls / ‖cls‖;   loss = Σ over crops of −mean over i of log(‖xᵢ − nearest other x‖ + eps)

    Args:
        cls: ``(≥ 2·B, dim)`` features of the student before its head, the global crops first. images: ``B``.
        across_ranks: look for neighbours among the current microbatches of all ranks.
    """
    total = cls.new_zeros((), dtype=torch.float32)
    # Autocast would round the distances between near-duplicates to zero.
    with torch.autocast(cls.device.type, enabled=False):
        for crop in (cls[:images], cls[images : 2 * images]):
            points = F.normalize(crop.float(), dim=-1, eps=eps)
            candidates, own = _gather(points) if across_ranks else (points, 0)
            with torch.no_grad():
                similarity = points @ candidates.T
                similarity[:, own : own + images].fill_diagonal_(-2.0)
                neighbour = similarity.argmax(dim=1)
            distance = F.pairwise_distance(points, candidates[neighbour], eps=eps)
            total = total - torch.log(distance + eps).mean()
    return total


def _gather(points: Tensor) -> tuple[Tensor, int]:
    """Return all ranks' points, through which gradients flow, and the place of the own ones."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return points, 0
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(points)), dist.get_rank() * len(points)


def entropy(probabilities: Tensor) -> Tensor:
    """Return the mean entropy of the rows of ``(rows, K)``, nats; 0 for no rows."""
    total = torch.zeros((), device=probabilities.device)
    for rows in _few(probabilities):
        total += torch.special.entr(probabilities[rows].float()).sum()
    return total / max(1, len(probabilities))


def softmax_entropy(logits: Tensor, temperature: float) -> Tensor:
    """Return the mean entropy of softmax(logits/temperature) over the rows of ``(rows, K)``, nats."""
    total = torch.zeros((), device=logits.device)
    for rows in _few(logits):
        total += torch.special.entr((logits[rows].float() / temperature).softmax(dim=-1)).sum()
    return total / max(1, len(logits))


def _few(matrix: Tensor) -> Iterator[slice]:
    """Yield the rows of a matrix, :data:`CHUNK` values at a time."""
    size = max(1, CHUNK.get(matrix.device.type, CHUNK["cuda"]) // matrix.shape[1])
    return (slice(start, start + size) for start in range(0, len(matrix), size))
