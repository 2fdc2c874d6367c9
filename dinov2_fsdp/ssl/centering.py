"""From the teacher's logits to targets that cannot collapse: an EMA centre, or Sinkhorn–Knopp.

Logits come as a list, one tensor ``(rows, prototypes)`` per microbatch. Sinkhorn–Knopp looks at all of a step's rows,
over all ranks, before the first target is known; the EMA centre serves one microbatch after the other.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Centering(Protocol):
    """Turns a step's teacher logits into targets, and keeps what it must remember between steps."""

    joint: bool
    """Whether the logits of all microbatches of a step must come in one call."""

    def targets(self, logits: list[Tensor], temperature: float) -> list[Tensor]:
        """Return probabilities ``(rows, prototypes)`` float32 for every microbatch."""
        ...

    def reduce(self) -> None:
        """Say that the step's last logits have been seen: the exchange between ranks may start."""
        ...

    def commit(self, skip: Tensor) -> None:
        """End the step; a non-zero ``skip`` (0-d, on the device) means that the step must leave no trace."""
        ...

    def norm(self) -> Tensor:
        """Return the norm of the centre, 0-d."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds, up to date, and fills on loading."""
        ...


class SoftmaxCentering:
    """softmax((logits − centre)/temperature), the centre an EMA of the mean logits (arXiv 2104.14294, eq. 4).

    The sums over ranks are reduced while the rest of the step runs and awaited when the centre is next needed; rows
    count alike, whichever rank holds them. With ``momentum=None`` the centre stays at zero.
    """

    joint = False

    def __init__(self, prototypes: int, momentum: float | None, device: torch.device) -> None:
        self.momentum = momentum
        self.centre = torch.zeros(prototypes, device=device)
        self._sums: Tensor | None = None
        self._reduced = False
        self._work: dist.Work | None = None
        self._skip: Tensor | None = None

    @torch.no_grad()
    def targets(self, logits: list[Tensor], temperature: float) -> list[Tensor]:
        if self._reduced:
            self._apply()
        if self.momentum is not None:
            self._accumulate(logits)
        # In place: of the largest tensors of a step, each exists once. The centre's float32 makes the difference so.
        scores = [torch.sub(chunk, self.centre).div_(temperature) for chunk in logits]
        return [torch.softmax(chunk, dim=-1, out=chunk) for chunk in scores]

    def _accumulate(self, logits: list[Tensor]) -> None:
        if self._sums is None:
            self._sums = torch.zeros(len(self.centre) + 1, device=self.centre.device)
        for chunk in logits:
            self._sums[:-1] += chunk.sum(dim=0, dtype=torch.float32)
            self._sums[-1] += len(chunk)

    def reduce(self) -> None:
        self._reduced = True
        if self._sums is not None and _several_ranks():
            self._work = dist.all_reduce(self._sums, async_op=True)

    def commit(self, skip: Tensor) -> None:
        self._skip = skip

    def _apply(self) -> None:
        self._reduced = False
        if self._sums is None:
            return
        if self._work is not None:
            self._work.wait()
        assert self.momentum is not None
        sums, rows = self._sums[:-1], self._sums[-1]
        updated = torch.lerp(sums / rows.clamp(min=1), self.centre, self.momentum)
        ignore = rows == 0
        if self._skip is not None:
            ignore = ignore | (self._skip != 0)
        self.centre.copy_(torch.where(ignore, self.centre, updated))
        self._sums = self._work = self._skip = None

    def norm(self) -> Tensor:
        return self.centre.norm()

    def tensors(self) -> dict[str, Tensor]:
        self._apply()
        return {"centre": self.centre}


class SinkhornCentering:
    """Sinkhorn–Knopp over all rows of a step (SwAV, arXiv 2006.09882, section 3.1; DINOv2, section 4).

    Rows and prototypes are normalised in turn, ending with the rows. It runs on logarithms: a maximum over all
    ranks is taken out per prototype before each exponential, which equals taking out one global maximum and stays
    finite where exp(logit/temperature) would overflow or vanish.
    """

    joint = True

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations

    @torch.no_grad()
    def targets(self, logits: list[Tensor], temperature: float) -> list[Tensor]:
        scores = [chunk.float() / temperature for chunk in logits]
        # Filled in on the device: a copy of a number would make the host wait for it.
        rows = torch.full((), float(sum(map(len, logits))), device=logits[0].device)
        if _several_ranks():
            dist.all_reduce(rows)
        log_rows = rows.clamp(min=1).log()
        prototypes = logits[0].shape[1]
        row_scale = [chunk.new_zeros(len(chunk)) for chunk in scores]
        prototype_scale = scores[0].new_zeros(prototypes)
        for _ in range(self.iterations):
            prototype_scale = -math.log(prototypes) - self._log_mass(scores, row_scale)
            row_scale = [-log_rows - (chunk + prototype_scale).logsumexp(dim=1) for chunk in scores]
        return [
            (chunk + prototype_scale + (scale + log_rows)[:, None]).exp_()
            for chunk, scale in zip(scores, row_scale, strict=True)
        ]

    def _log_mass(self, scores: list[Tensor], row_scale: list[Tensor]) -> Tensor:
        """Return log Σ over all ranks' rows of exp(score + row scale), per prototype."""
        scaled = [chunk + scale[:, None] for chunk, scale in zip(scores, row_scale, strict=True) if len(chunk)]
        largest = torch.full_like(scores[0].new_empty(scores[0].shape[1]), -math.inf)
        for chunk in scaled:
            largest = torch.maximum(largest, chunk.amax(dim=0))
        if _several_ranks():
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        # Without a single row anywhere nothing reads the result; zero keeps it free of NaN.
        largest = torch.where(largest == -math.inf, torch.zeros_like(largest), largest)
        mass = torch.zeros_like(largest)
        for chunk in scaled:
            mass += (chunk - largest).exp_().sum(dim=0)
        if _several_ranks():
            dist.all_reduce(mass)
        return largest + mass.log()

    def reduce(self) -> None:
        """Every exchange has already happened."""

    def commit(self, skip: Tensor) -> None:
        """Nothing is remembered from step to step."""

    def norm(self) -> Tensor:
        return torch.zeros(())

    def tensors(self) -> dict[str, Tensor]:
        return {}


def build_centering(
    method: str, prototypes: int, momentum: float, iterations: int, device: torch.device
) -> SoftmaxCentering | SinkhornCentering:
    """Return the centering that ``loss.centering`` names: ``softmax``, ``sinkhorn`` or ``none``."""
    if method == "sinkhorn":
        return SinkhornCentering(iterations)
    return SoftmaxCentering(prototypes, momentum if method == "softmax" else None, device)


def _several_ranks() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1
