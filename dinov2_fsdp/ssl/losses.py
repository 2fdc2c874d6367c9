"""The three losses. Logits may come in any precision; all sums are taken in float32.

``B`` images, ``C`` crops of each (two global ones first), ``K`` prototypes; crops are crop-major: row ``c·B + i``
is crop ``c`` of image ``i``.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor, temperature: float, mass: float | Tensor = 1.0) -> Tensor:
    """Return −Σₖ targetₖ · log softmax(logits/temperature)ₖ for every row: ``(rows,)`` float32.

    ``mass`` is what each row of ``targets`` sums to. As it is known, log-softmax need not be materialised:
    ``mass · logsumexp(z) − Σₖ targetₖ · zₖ``.
    """
    scaled = logits.float() / temperature
    return mass * scaled.logsumexp(dim=-1) - torch.einsum("rk,rk->r", targets, scaled)


def dino_loss(logits: Tensor, targets: Tensor, images: int, temperature: float) -> Tensor:
    """Return DINO's loss (arXiv 2104.14294, eq. 3): a mean over crop pairs and images.

    ::

        loss = mean over i, over teacher crops t in {0, 1}, over student crops s ≠ t of
               −Σₖ targets[t, i, k] · log softmax(logits[s, i] / temperature)[k]

    Args:
        logits: ``(C·B, K)`` of the student. targets: ``(2·B, K)`` probabilities of the teacher. images: ``B``.
    """
    crops = logits.shape[0] // images
    first, second = targets[:images], targets[images:]
    # A global crop is held against the other one; a local crop against both, whose cross-entropies add up.
    total = cross_entropy(logits[:images], second, temperature).sum()
    total = total + cross_entropy(logits[images : 2 * images], first, temperature).sum()
    if crops > 2:
        both = (first + second).repeat(crops - 2, 1)
        total = total + cross_entropy(logits[2 * images :], both, temperature, mass=2.0).sum()
    terms = 2 + 2 * (crops - 2)
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
    per_row = torch.special.entr(probabilities.float()).sum(dim=-1)
    return per_row.sum() / max(1, len(per_row))
