"""How far a run is and how fast, read from its metrics. No torch."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

_SAVING = ("checkpoint/stall_s", "checkpoint/writing_s")
_TAIL = 256 * 1024
_SLACK = 60
"""Seconds by which SLURM may be late or early with a signal (sbatch's manual, --signal)."""


def last_lines(run_dir: Path) -> list[dict[str, Any]]:
    """Return the newest lines of a run's metrics, oldest first; none before the first."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - _TAIL))
            texts = stream.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    lines = []
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # cut off, or being written
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


def last_step(run_dir: Path) -> int:
    """Return the last step that a run is known to have done: logged, or saved."""
    # Not the last line alone: what a save in the background has cost is told some steps later.
    logged = [int(line["step"]) for line in last_lines(run_dir)]
    return max([*logged, *saved_steps(run_dir)], default=0)


def saved_steps(run_dir: Path) -> list[int]:
    """Return the steps of a run's complete checkpoints, oldest first."""
    folder = run_dir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"step_(\d{8,})", name)))


def signal_seconds(run_dir: Path, batch: int, minutes: int | None, default: int) -> int:
    """Return how many seconds before its end a job must be told to stop.

    Twice a step and a save of this run as measured, plus what SLURM may be off by; before anything is measured,
    ``default``, but never more than a quarter of the time limit.
    """
    lines = last_lines(run_dir)
    steps = [batch / line["img_per_s"] for line in lines if line.get("img_per_s")]
    saves = [sum(line.get(key, 0.0) for key in _SAVING) for line in lines if line.get(_SAVING[1])]
    seconds = math.ceil(2 * (max(steps[-50:]) + max(saves[-50:]))) + _SLACK if steps and saves else default
    return seconds if minutes is None else max(1, min(seconds, 15 * minutes))


def is_over(run: Path) -> bool:
    """Return whether a run has reached its last step and saved it."""
    lines = [line for line in last_lines(run) if "eta" in line][-1:]
    return bool(lines) and lines[0]["eta"] == 0 and lines[0]["step"] in saved_steps(run)
