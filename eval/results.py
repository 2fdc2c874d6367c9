"""Where an evaluation's results go: ``results.json`` of the task and one line of the run's ``leaderboard.csv``."""

from __future__ import annotations

import csv
import io
import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

COLUMNS = ("date", "step", "task", "backbone", "metric", "value", "train", "test", "results")


def run_of(path: Path) -> Path | None:
    """Return the run directory that ``path`` (a run, one of its checkpoints or a file in it) belongs to, or None."""
    path = path.resolve()
    for folder in (path, *path.parents[:3]):
        if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
            return folder
    return None


def task_folder(run: Path, step: int, task: str) -> Path:
    """Return where the results of ``task`` on the checkpoint of ``step`` belong."""
    return run / "eval" / f"step_{step:08d}" / task


def write_results(folder: Path, results: dict[str, Any]) -> Path:
    """Write ``results``, dated, to ``folder/results.json`` in place of older ones, and return that file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    partial = folder / f".results.json.{os.getpid()}"
    dated = {**results, "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    partial.write_text(json.dumps(dated, indent=2, ensure_ascii=False) + "\n")
    partial.replace(file)
    return file


def add_to_leaderboard(run: Path, line: dict[str, Any]) -> Path:
    """Append ``line`` (keys: ``COLUMNS``), dated, to the run's ``leaderboard.csv`` in one write; return the file."""
    file = run / "leaderboard.csv"
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    if not file.exists():
        writer.writeheader()
    writer.writerow({"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), **line})
    with file.open("a", newline="") as stream:
        stream.write(text.getvalue())
    return file


def record(
    results: dict[str, Any], task: str, metric: str, run: Path | None = None, output: str | Path | None = None
) -> Path | None:
    """Write ``results`` to ``output``, or else where the run keeps those of its step; add a line to its leaderboard.

    Args:
        results: has ``task``, ``backbone``, ``step``, ``metrics`` and ``data`` with ``train`` and ``test``.
        task: the folder's name under ``eval/step_…``.
        metric: which of the metrics the leaderboard shows.

    Returns:
        The file, or None where there is neither a run nor ``output``.
    """
    if output is None and (run is None or results["step"] is None):
        print("not written anywhere: these weights belong to no run; give --output DIR to keep the results")
        return None
    folder = Path(output) if output is not None else task_folder(run or Path(), results["step"], task)
    file = write_results(folder, results)
    if run is not None:
        line = {key: results[key] for key in ("step", "task", "backbone")}
        line |= {"metric": metric, "value": round(results["metrics"][metric], 3)}
        line |= {
            "train": results["data"]["train"],
            "test": results["data"]["test"],
            "results": os.path.relpath(file, run),
        }
        add_to_leaderboard(run, line)
    print(f"written to {file}")
    return file
