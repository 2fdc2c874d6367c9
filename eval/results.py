"""Where an evaluation's results go: ``results.json`` of the task and one line of the run's ``leaderboard.csv``."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

COLUMNS = ("date", "step", "task", "backbone", "metric", "value", "train", "test", "results")
KEY = ("step", "task", "backbone", "metric", "train", "test")
"""Columns that make a line of the leaderboard the same evaluation as another one, which it then replaces."""
PARTIAL = "features.partial"
"""Folder, beside a task's results, of what an interrupted evaluation goes on from: a folder for each data set."""
LIMITS = ("max_train", "max_test")
"""Settings that take part of the images of a set, 0 for all: of those to learn from, of those to test on."""
_PART = re.compile(r" \(\d+ images\)$")
"""How :func:`data_of` ends what is part of a set."""


def run_of(path: Path) -> Path | None:
    """Return the run directory that ``path`` (a run, one of its checkpoints or a file in it) belongs to, or None."""
    path = path.resolve()
    for folder in (path, *path.parents[:3]):
        if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
            return folder
    return None


def task_folder(run: Path, step: int, task: str, data: dict[str, str] | None = None, part: bool = False) -> Path:
    """Return where the results of ``task`` on the checkpoint of ``step`` belong.

    What looked at ``part`` of a set lies in ``TASK_part_`` and a short hash of the ``data`` (see :func:`data_of`),
    even where nothing else is there: ``TASK`` alone says that a number is of whole sets. Results of other whole
    ``data`` that are there already keep their place: the folder's name then ends in the hash.
    """
    folder = run / "eval" / f"step_{step:08d}" / task
    if data is not None and part:
        return folder.with_name(f"{task}_part_{digest_of(data)}")
    try:
        found = data_of(json.loads((folder / "results.json").read_text()))
    except (OSError, ValueError, AttributeError):
        return folder
    return folder if data is None or found == data else folder.with_name(f"{task}_{digest_of(data)}")


def data_of(results: dict[str, Any]) -> dict[str, str]:
    """Return what the images of ``train`` and ``test`` are, by the ``data`` and ``settings`` of results.

    Part of a set (``max_train``, ``max_test``) is another set.
    """
    data, settings = results.get("data", {}), results.get("settings", {})
    limits = {name: settings.get(limit, 0) for name, limit in zip(("train", "test"), LIMITS, strict=True)}
    return {name: f"{data.get(name)}{f' ({limit} images)' if limit else ''}" for name, limit in limits.items()}


def of_part(results: dict[str, Any]) -> bool:
    """Return whether results are of part of a set, by their ``settings``."""
    return any(results.get("settings", {}).get(name) for name in LIMITS)


def without_idle_limits(settings: Any, train: int, test: int) -> Any:
    """Return settings, a dataclass, in which a limit that reaches a set of so many images is none."""
    idle = {name: 0 for name, size in zip(LIMITS, (train, test), strict=True) if getattr(settings, name) >= size}
    return replace(settings, **idle)


def measured_on(data: dict[str, str]) -> str:
    """Return ``"on TEST"``, with ``", from TRAIN"`` if that is a part, by :func:`data_of` or a leaderboard's line."""
    learnt = f", from {data['train']}" if _PART.search(data["train"]) else ""
    return f"on {data['test']}{learnt}"


def digest_of(data: dict[str, str]) -> str:
    """Return a short hash of what :func:`data_of` says."""
    return hashlib.blake2b(json.dumps([data["train"], data["test"]]).encode(), digest_size=3).hexdigest()


def write_results(folder: Path, results: dict[str, Any]) -> Path:
    """Write ``results``, dated, to ``folder/results.json`` in place of older ones, and return that file.

    What is not a finite number becomes null, since JSON has no word for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    partial = folder / f".results.json.{os.getpid()}"
    dated = _finite({**results, "date": _now()})
    partial.write_text(json.dumps(dated, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(file)
    return file


def add_to_leaderboard(run: Path, line: dict[str, Any]) -> Path:
    """Put ``line`` (keys: ``COLUMNS``), dated, at the end of the run's ``leaderboard.csv``; return the file.

    An older line of the same ``KEY`` goes. The file is replaced as a whole, and writers wait for each other.
    """
    file = run / "leaderboard.csv"
    new = {name: str(line.get(name, "")) for name in COLUMNS} | {"date": _now()}
    with _locked(run / ".leaderboard.lock"):
        lines = [old for old in read_leaderboard(run) if any(old.get(name) != new[name] for name in KEY)]
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows([*lines, new])
        partial = run / f".leaderboard.csv.{os.getpid()}"
        partial.write_text(text.getvalue(), encoding="utf-8")
        partial.replace(file)
    return file


def read_leaderboard(run: Path) -> list[dict[str, str]]:
    """Return the lines of a run's leaderboard, by column, in the order of their dates; none where there is no file."""
    file = run / "leaderboard.csv"
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def folder_of(
    run: Path | None,
    step: int | None,
    task: str,
    data: dict[str, str] | None,
    output: str | Path | None,
    part: bool = False,
) -> Path | None:
    """Return where results go: ``output``, else as :func:`task_folder` says for the run and its step, else None."""
    if output is not None:
        return Path(output)
    return None if run is None or step is None else task_folder(run, step, task, data, part)


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
    data = data_of(results)
    part = of_part(results)
    if part:
        print(f"part of the images: {measured_on(data)}")
    folder = folder_of(run, results["step"], task, data, output, part)
    if folder is None:
        print("not written anywhere: these weights belong to no run; give --output DIR to keep the results")
        return None
    value = results["metrics"][metric]
    file = write_results(folder, {**results, "metric": metric, "value": value})
    if run is not None:
        line = {key: results[key] for key in ("step", "task", "backbone")}
        line |= {"metric": metric, "value": round(value, 4 if abs(value) < 10 else 3)}
        add_to_leaderboard(run, {**line, **data, "results": os.path.relpath(file, run)})
    print(f"written to {file}")
    return file


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
