"""Evaluate a run: ``python launchers/eval.py --run runs/NAME --tasks knn pictures [eval.KEY=VALUE …]``.

Each task is a command of its own under ``eval/``; they run here, one after the other.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dinov2_fsdp.errors import UserError, nearest, run_cli

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Task:
    """One evaluation: what it tells, and its command line (after the interpreter) for a run, a step and overrides."""

    summary: str
    command: Callable[[Path, int | None, dict[str, Any]], list[str]]


def _knn(run: Path, step: int | None, overrides: dict[str, Any]) -> list[str]:
    flags = {
        "eval.train": "--train",
        "eval.test": "--test",
        "eval.resize": "--resize",
        "eval.size": "--size",
        "eval.batch": "--batch",
        "eval.k": "--k",
        "eval.temperature": "--temperature",
        "eval.max_train": "--max-train",
        "eval.max_test": "--max-test",
        "data.workers": "--workers",
        "parallel.device": "--device",
    }
    return ["eval/knn.py", "--weights", str(run), *_step(step), *_flags(flags, overrides)]


def _pictures(run: Path, step: int | None, overrides: dict[str, Any]) -> list[str]:
    flags = {"eval.test": "--data", "parallel.device": "--device"}
    return ["eval/pictures.py", "--run", str(run), *_step(step), *_flags(flags, overrides)]


TASKS: dict[str, Task] = {
    "knn": Task("k-nearest-neighbour accuracy on frozen features", _knn),
    "pictures": Task("training curves and principal components of patch features", _pictures),
}

_OVERRIDABLE = ("data.workers", "parallel.device")


def commands(run: Path, tasks: list[str], step: int | None, overrides: list[str]) -> list[list[str]]:
    """Return one command line per task, to be run from the repository's root.

    Raises:
        UserError: a task is unknown, ``run`` is no run, or an override is wrong or does not concern evaluations.
    """
    for name in tasks:
        if name not in TASKS:
            raise UserError(f"task '{name}' is unknown{nearest(name, TASKS)}\nvalid: {', '.join(TASKS)}")
    if not (run / "config.yaml").is_file():
        raise UserError(f"--run {run} is no run directory (it holds no config.yaml); give one like runs/demo")
    values = _checked(run, overrides)
    return [[sys.executable, *TASKS[name].command(run.resolve(), step, values)] for name in dict.fromkeys(tasks)]


def _checked(run: Path, overrides: list[str]) -> dict[str, Any]:
    """Return the overridden keys with the values that the run's config gives them."""
    if not overrides:
        return {}
    from dinov2_fsdp import config as configs

    config = configs.load(run / "config.yaml", overrides)
    values = {}
    for override in overrides:
        key = override.partition("=")[0]
        section, _, name = key.partition(".")
        if not (section == "eval" and name) and key not in _OVERRIDABLE:
            raise UserError(
                f"'{key}' was settled when the run was trained\nvalid here: eval.KEY, {', '.join(_OVERRIDABLE)}"
            )
        values[key] = getattr(getattr(config, section), name)
    return values


def _step(step: int | None) -> list[str]:
    return [] if step is None else ["--step", str(step)]


def _flags(flags: dict[str, str], overrides: dict[str, Any]) -> list[str]:
    arguments = []
    for key, value in overrides.items():
        if key in flags and value is not None:
            arguments += [flags[key], *map(str, value if isinstance(value, tuple) else (value,))]
    return arguments


def _parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:<10} {task.summary}" for name, task in TASKS.items())
    parser = argparse.ArgumentParser(
        prog="launchers/eval.py",
        description="Evaluate a run on this machine.",
        epilog=f"tasks:\n{listing}\n\nresults go to RUN/eval/step_…/TASK/results.json and RUN/leaderboard.csv",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", metavar="DIR", required=True, type=Path, help="the run directory")
    parser.add_argument("--tasks", metavar="TASK", nargs="+", default=["knn"], help="what to evaluate (default: knn)")
    parser.add_argument("--step", type=int, help="which checkpoint; by default the newest")
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    parser.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", help="settings of the evaluation, e.g. eval.size=448"
    )
    return parser


def main() -> int:
    """Run the command line; return the first failing task's exit code, after all others had their turn."""
    parser = _parser()
    arguments = parser.parse_intermixed_args()
    # `--tasks` takes all words that follow, so the overrides may have ended up among them.
    words = [*arguments.tasks, *arguments.overrides]
    tasks = [word for word in words if "=" not in word]
    todo = commands(arguments.run, tasks, arguments.step, [word for word in words if "=" in word])
    code = 0
    for command in todo:
        print(f"+ {shlex.join(command)}", flush=True)
        if not arguments.dry_run:
            code = subprocess.run(command, cwd=ROOT, check=False).returncode or code
    return code


if __name__ == "__main__":
    run_cli(main)
