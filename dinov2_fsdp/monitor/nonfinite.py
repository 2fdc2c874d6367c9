"""Steps without a finite gradient: counted without waiting for the device, and explained when there are too many."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LATE = 8
"""Steps that the host may be ahead of the device, or of the other ranks, when it hears of too many."""


class NonFiniteSteps:
    """Counts skipped steps in a row and remembers what the last steps looked like.

    Args:
        limit: skipped steps in a row that are borne.
        device: of the tensors.
    """

    def __init__(self, limit: int, device: torch.device) -> None:
        self.limit = limit
        self.in_a_row = torch.zeros((), device=device)
        # The host hears late: by then a good step may have ended the row that was too long.
        self._most = torch.zeros((), device=device)
        self._on_gpu = device.type == "cuda"
        self._host = torch.zeros((), pin_memory=self._on_gpu)
        self._copied = torch.cuda.Event() if self._on_gpu else None
        self._steps: deque[tuple[int, Tensor, dict[str, Tensor], list[Tensor]]] = deque(maxlen=limit + 1 + _LATE)

    def add(self, step: int, skip: Tensor, values: Mapping[str, Tensor], samples: list[Tensor]) -> None:
        """Take in one step: whether it was skipped (0-d, 1 if so), its 0-d meters, the indices of its images."""
        self.in_a_row.add_(skip).mul_(skip)
        torch.maximum(self._most, self.in_a_row, out=self._most)
        self._steps.append((step, self.in_a_row.clone(), dict(values), samples))
        if self._copied is None or self._copied.query():
            self._host.copy_(self._most, non_blocking=True)
            if self._copied is not None:
                self._copied.record()

    def too_many(self) -> bool:
        """Return whether more than ``limit`` steps in a row were skipped, as far as the host has heard; never waits.

        Once true it stays so, whatever the steps since.
        """
        return (self._copied is None or self._copied.query()) and self._host.item() > self.limit

    def last_steps(self, name: Callable[[int], str]) -> list[dict[str, Any]]:
        """Return this rank's longest row of skipped steps, newest last, as numbers and text; waits for the device.

        Each says how many steps in a row were skipped with it, those of earlier lives included.

        Args:
            name: gives an image's name from its index.
        """
        rows: list[list[dict[str, Any]]] = [[]]
        for step, in_a_row, values, samples in self._steps:
            if not (count := int(in_a_row.item())):
                rows.append([])
                continue
            indices = [int(index) for part in samples for index in part.tolist()]
            rows[-1].append(
                {
                    "step": step,
                    "in_a_row": count,
                    "values": {key: float(value) for key, value in values.items()},
                    "samples": indices,
                    "names": [name(index) for index in indices],
                }
            )
        return max(rows, key=lambda row: row[-1]["in_a_row"] if row else 0)


def write_report(run_dir: Path, by_rank: list[list[dict[str, Any]]]) -> tuple[Path, str]:
    """Write what every rank remembers of the skipped steps; return the file and one line that sums it up."""
    steps = by_rank[0]
    path = run_dir / f"nonfinite_step_{steps[-1]['step']:08d}.json"
    # Not strict JSON's numbers: what is not finite is the point, so it stands there as text.
    path.write_text(json.dumps(_as_text({"ranks": by_rank}), indent=1))
    causes = []
    for rank, remembered in enumerate(by_rank):
        values = remembered[-1]["values"]
        bad = [f"{key} {value}" for key, value in sorted(values.items()) if not -float("inf") < value < float("inf")]
        causes += [f"rank {rank}: {', '.join(bad)}"] if bad else []
    samples = [index for remembered in by_rank for index in remembered[-1]["samples"]]
    line = (
        f"{steps[-1]['in_a_row']} steps in a row had no finite gradient, the last is step {steps[-1]['step']}; "
        f"{'; '.join(causes[:2])}; its images are {', '.join(map(str, samples[:8]))}{' …' if len(samples) > 8 else ''}"
    )
    return path, line


def _as_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_text(item) for item in value]
    if isinstance(value, float) and not -float("inf") < value < float("inf"):
        return str(value)
    return value
