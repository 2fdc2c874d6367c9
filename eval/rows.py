"""Rows of features as they are made: in memory, or in a mapped file that an interrupted extraction goes on from."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KEPT, BAD = 1, 2
_SECONDS_BETWEEN_SAVES = 10.0


class Rows:
    """Rows in memory, and for each whether it is done: 0 not yet, ``KEPT`` or ``BAD``."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.rows: Tensor | None = None
        self.state = np.zeros(count, np.uint8)

    def done(self) -> int:
        """Return how many rows need no work any more, from the first on."""
        return 0

    def write(self, start: int, rows: Tensor, state: NDArray[np.uint8]) -> None:
        if self.rows is None:
            self.rows = self._allocate(tuple(rows.shape[1:]))
        self.rows[start : start + len(rows)] = rows
        self.state[start : start + len(rows)] = state

    def save(self) -> None:
        """Make sure that what was written outlives this process."""

    def _allocate(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(self.count, *shape)


class RowsOnDisk(Rows):
    """Rows in a file that is mapped into memory (``PATH.rows``), beside it the state of each (``.state``).

    ``PATH.json`` holds ``key``: what the rows depend on. Rows of another key are not used.
    """

    def __init__(self, count: int, path: Path, key: dict[str, Any]) -> None:
        super().__init__(count)
        self.path, self.key = path, {**key, "count": count}
        self.saved = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            found = json.loads(path.with_suffix(".json").read_text())
            shape = tuple(found.pop("shape"))
            if found != json.loads(json.dumps(self.key)):
                return
            self.state = np.fromfile(path.with_suffix(".state"), np.uint8)
            self._map = np.memmap(path.with_suffix(".rows"), np.float32, "r+", shape=(count, *shape))
            self.rows = torch.from_numpy(self._map)
        except (OSError, ValueError, KeyError):
            self.state = np.zeros(count, np.uint8)
        if len(self.state) != count:
            self.state, self.rows = np.zeros(count, np.uint8), None

    def done(self) -> int:
        missing = np.flatnonzero(self.state == 0)
        return int(missing[0]) if len(missing) else self.count

    def write(self, start: int, rows: Tensor, state: NDArray[np.uint8]) -> None:
        super().write(start, rows, state)
        if time.monotonic() - self.saved > _SECONDS_BETWEEN_SAVES:
            self.save()

    def save(self) -> None:
        if self.rows is None:
            return
        self._map.flush()
        draft = self.path.with_suffix(".state.tmp")
        self.state.tofile(draft)
        draft.replace(self.path.with_suffix(".state"))
        self.saved = time.monotonic()

    def _allocate(self, shape: tuple[int, ...]) -> Tensor:
        self.path.with_suffix(".state").unlink(missing_ok=True)
        self._map = np.memmap(self.path.with_suffix(".rows"), np.float32, "w+", shape=(self.count, *shape))
        self.path.with_suffix(".json").write_text(json.dumps({**self.key, "shape": shape}))
        return torch.from_numpy(self._map)
