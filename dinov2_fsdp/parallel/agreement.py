"""What all ranks have to know at the end of each step, agreed without making the device wait."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from dinov2_fsdp.parallel.world import World, cpu_group


@dataclass(frozen=True)
class Agreed:
    """What holds for the run, because it holds on at least one rank (``bad_images``: the sum over ranks)."""

    stop: bool = False
    save_failed: bool = False
    nonfinite: bool = False
    bad_images: int = 0


class Agreement:
    """A sum of four small numbers over the ranks, once a step, between hosts (gloo) and beside the step's work.

    :meth:`propose` sends what this rank knows, :meth:`result` gives what holds for all. Because every rank gets the
    same answer at the same step, all stop, save or fail together.
    """

    def __init__(self, world: World) -> None:
        self._group = cpu_group(world)
        self._numbers = torch.zeros(4, dtype=torch.int64)
        self._work: dist.Work | None = None

    def propose(self, own: Agreed) -> None:
        """Send this rank's part. Collective, does not wait."""
        self._numbers = torch.tensor([own.stop, own.save_failed, own.nonfinite, own.bad_images], dtype=torch.int64)
        if self._group is not None:
            self._work = dist.all_reduce(self._numbers, group=self._group, async_op=True)

    def result(self) -> Agreed:
        """Return what the last :meth:`propose` of all ranks came to."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        stop, save_failed, nonfinite, bad_images = self._numbers.tolist()
        return Agreed(stop > 0, save_failed > 0, nonfinite > 0, bad_images)

    def gather(self, mine: Any) -> list[Any]:
        """Return every rank's object, on every rank. Collective, waits."""
        if self._group is None:
            return [mine]
        found: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(found, mine, group=self._group)
        return found
