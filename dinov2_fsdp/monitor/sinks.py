"""Where metrics are written: metrics.jsonl and TensorBoard, each continued at the step that a run resumes from."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinov2_fsdp.errors import UserError

logger = logging.getLogger(__name__)


class JsonLines:
    """One JSON object per line, appended. A number that is not finite is written as null and listed in ``nonfinite``.

    Lines after ``start_step`` belong to a life that died after its last checkpoint: they are dropped when the file is
    opened, as is a line cut short. A run that starts at step 0 starts an empty file.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _drop_after(path, start_step)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  (lives as long as the run)

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line. A full disk costs the line and a warning, not the run."""
        data = (to_json(values) + "\n").encode()
        size = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(data) != len(data):
                raise OSError("no space left for a whole line")
        except OSError as error:
            self._file.truncate(size)
            logger.warning("a line of %s is lost: %s", self.path, error)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def to_json(values: Mapping[str, Any]) -> str:
    """Return ``values`` as one line of valid JSON, numbers that are not finite as null and named in ``nonfinite``."""
    bad = [name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
    line = {name: None if name in bad else value for name, value in values.items()}
    return json.dumps(line | {"nonfinite": bad} if bad else line, allow_nan=False, ensure_ascii=False)


def _drop_after(path: Path, step: int) -> None:
    kept = path.with_name(path.name + ".tmp")
    dropped = 0
    with open(path, "rb") as source, open(kept, "wb") as target:
        for line in source:
            if step > 0 and line.endswith(b"\n") and _step(line) <= step:
                target.write(line)
            else:
                dropped += 1
        target.flush()
        os.fsync(target.fileno())
    if dropped:
        os.replace(kept, path)
        logger.info("%s: dropped %d lines written after step %d", path, dropped, step)
    else:
        kept.unlink()


def _step(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class TensorBoard:
    """Scalars as TensorBoard events; events after ``start_step`` from an earlier life are hidden.

    Raises:
        UserError: tensorboard is not installed.
    """

    def __init__(self, run_dir: Path, start_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # slow, and not every run wants it
        except ImportError:
            raise UserError(
                "log.tensorboard=true needs the package tensorboard, which is not installed\n"
                "install tensorboard, or set log.tensorboard=false (metrics.jsonl is written either way)"
            ) from None
        purge = start_step + 1 if start_step else 0
        self._writer = SummaryWriter(str(run_dir), purge_step=purge)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write each value as a scalar of its name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is buffered and close the file."""
        self._writer.close()
