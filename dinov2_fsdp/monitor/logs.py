"""A log file per rank, and warnings of every rank on stderr."""

from __future__ import annotations

import logging
import sys
from pathlib import Path


class _RankFile(logging.FileHandler):
    """The log file that ``setup_logging`` opened."""


class _Stderr(logging.Handler):
    """Writes to whatever stderr is at the time, so that a live bar on the terminal stays whole."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "file_only", False):
            return
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def setup_logging(run_dir: str | Path, rank: int) -> None:
    """Send ``logging`` from INFO on to ``logs/rank_N.log`` (appended) and from WARNING on to stderr as ``[rank N]``.

    A second call replaces the first one's handlers.
    """
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, (_RankFile, _Stderr))]:
        root.removeHandler(handler)
        handler.close()

    path = Path(run_dir) / "logs" / f"rank_{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _RankFile(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    stderr = _Stderr(logging.WARNING)
    stderr.setFormatter(logging.Formatter(f"[rank {rank}] %(levelname)s %(name)s: %(message)s"))
    root.addHandler(file)
    root.addHandler(stderr)
    root.setLevel(logging.INFO)
