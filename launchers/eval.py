"""Evaluate a run: ``python launchers/eval.py --run runs/NAME --tasks knn pictures [KEY=VALUE …]``.

Each task is a command of its own under ``eval/``. On a cluster's login node each task and checkpoint becomes a job;
elsewhere, and with ``--local``, they run here, one after the other. ``--watch`` evaluates each new checkpoint.

``eval.KEY=VALUE`` concerns all tasks, ``TASK.FLAG=VALUE`` is a flag of one: ``segmentation.data=tar:camvid.tar
segmentation.classes=11``.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dinov2_fsdp.errors import EXIT_FAILED, Parser, UserError, nearest, run_cli
from launchers.cluster.options import add_job_arguments, given_options

if TYPE_CHECKING:
    from launchers.cluster.evaluations import Work
    from launchers.cluster.options import JobOptions

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Task:
    """One evaluation: what it tells, and its command line (after the interpreter) for a run, a step and overrides."""

    summary: str
    command: Callable[[Path, int | None, dict[str, Any]], list[str]]


_DENSE_FLAGS = {
    "eval.train": "--train",
    "eval.test": "--test",
    "eval.max_train": "--max-train",
    "eval.max_test": "--max-test",
    "data.workers": "--workers",
    "parallel.device": "--device",
}
_IMAGE_FLAGS = {**_DENSE_FLAGS, "eval.resize": "--resize", "eval.size": "--size", "eval.batch": "--batch"}
_KNN_FLAGS = {**_IMAGE_FLAGS, "eval.k": "--k", "eval.temperature": "--temperature"}
_RETRIEVAL_FLAGS = {**_IMAGE_FLAGS, "eval.train": "--gallery", "eval.test": "--queries"}


def _evaluation(
    script: str, flags: dict[str, str], *more: str
) -> Callable[[Path, int | None, dict[str, Any]], list[str]]:
    def command(run: Path, step: int | None, overrides: dict[str, Any]) -> list[str]:
        return [f"eval/{script}.py", "--weights", str(run), *_step(step), *more, *_flags(flags, overrides)]

    return command


def _pictures(run: Path, step: int | None, overrides: dict[str, Any]) -> list[str]:
    flags = {"eval.test": "--data", "parallel.device": "--device"}
    return ["eval/pictures.py", "--run", str(run), *_step(step), *_flags(flags, overrides)]


def _report(run: Path, step: int | None, overrides: dict[str, Any]) -> list[str]:
    return ["eval/report.py", "--run", str(run)]


TASKS: dict[str, Task] = {
    "knn": Task("k-nearest-neighbour accuracy on frozen features", _evaluation("knn", _KNN_FLAGS)),
    "linear": Task("linear probe: all heads of the published grid", _evaluation("linear", _IMAGE_FLAGS)),
    "logistic": Task("logistic regression over 45 values of C", _evaluation("logistic", _IMAGE_FLAGS)),
    "segmentation": Task("mean IoU of a linear head", _evaluation("segmentation", _DENSE_FLAGS)),
    "segmentation_ms": Task("the same, multi-scale", _evaluation("segmentation", _DENSE_FLAGS, "--multi-scale")),
    "depth": Task("depth errors of a linear head", _evaluation("depth", _DENSE_FLAGS)),
    "depth_4_layers": Task("the same on four layers", _evaluation("depth", _DENSE_FLAGS, "--layers", "4")),
    "retrieval": Task("mean average precision; same class is relevant", _evaluation("retrieval", _RETRIEVAL_FLAGS)),
    "pictures": Task("curves, patch features, attention, neighbours, training crops", _pictures),
    "report": Task("everything of the run as one HTML page", _report),
}

_OVERRIDABLE = ("data.workers", "parallel.device")


def commands(run: Path, tasks: list[str], step: int | None, overrides: list[str]) -> list[list[str]]:
    """Return one command line per task, to be run from the repository's root.

    Raises:
        UserError: a task is unknown, ``run`` is no run, or an override is wrong or does not concern evaluations.
    """
    check_tasks(tasks)
    if not (run / "config.yaml").is_file():
        raise UserError(f"--run {run} is no run directory (it holds no config.yaml); give one like runs/demo")
    own = {name: [word for word in overrides if word.startswith(f"{name}.")] for name in TASKS}
    for name, words in own.items():
        if words and name not in tasks:
            raise UserError(f"'{words[0]}' is a flag of {name}, which is not among --tasks {' '.join(tasks)}")
    values = _checked(run, [word for word in overrides if word.partition(".")[0] not in TASKS])
    found = []
    for name in dict.fromkeys(tasks):
        command = [*TASKS[name].command(run.resolve(), step, values), *_own_flags(own[name])]
        if own[name]:
            _check_flags(command)
        found.append([sys.executable, *command])
    return found


def _own_flags(words: list[str]) -> list[str]:
    """Return the flags of ``TASK.FLAG=VALUE`` words; true and false switch a flag, ``[a,b]`` holds several values."""
    flags: list[str] = []
    for word in words:
        key, _, value = word.partition("=")
        name = key.partition(".")[2].replace("_", "-")
        if value.lower() in ("true", "false"):
            flags.append(f"--{'' if value.lower() == 'true' else 'no-'}{name}")
            continue
        several = value.startswith("[") and value.endswith("]")
        flags += [f"--{name}", *(part.strip() for part in (value[1:-1].split(",") if several else [value]))]
    return flags


def _check_flags(command: list[str]) -> None:
    """Refuse what the task's own command line would refuse, before anything has started. Raises :class:`UserError`."""
    import_module(f"eval.{Path(command[0]).stem}")._parser().parse_args(command[1:])


def check_tasks(tasks: list[str]) -> None:
    """Refuse a task that does not exist.

    Raises:
        UserError: naming it.
    """
    for name in tasks:
        if name not in TASKS:
            raise UserError(f"task '{name}' is unknown{nearest(name, TASKS)}\nvalid: {', '.join(TASKS)}")


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
    listing = "\n".join(f"  {name:<16} {task.summary}" for name, task in TASKS.items())
    parser = Parser(
        prog="launchers/eval.py",
        description="Evaluate a run: as SLURM jobs where there is a cluster, else on this machine.",
        epilog=f"tasks:\n{listing}\n\nresults go to RUN/eval/step_…/TASK…/results.json and RUN/leaderboard.csv",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--run", metavar="DIR", required=True, type=Path, help="the run directory")
    parser.add_argument("--tasks", metavar="TASK", nargs="+", default=["knn"], help="what to evaluate (default: knn)")
    parser.add_argument("--step", metavar="N[,N…]|all", help="which checkpoints; by default the newest")
    parser.add_argument("--watch", action="store_true", help="evaluate each new checkpoint until the run is over")
    parser.add_argument("--local", action="store_true", help="evaluate on this machine also where there is a cluster")
    parser.add_argument("--follow", action="store_true", help="wait for the jobs and show the leaderboard")
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    add_job_arguments(parser, leave_out=("preflight", "meet_seconds", "max_requeues", "max_restarts"))
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        help="settings of all tasks, e.g. eval.size=448, or a flag of one, e.g. segmentation.classes=11",
    )
    return parser


def _steps(run: Path, text: str | None) -> list[int | None]:
    """Return the steps that ``--step`` names; None is the newest.

    Raises:
        UserError: it is no number and not ``all``, or the run has no such checkpoint.
    """
    from launchers.cluster.progress import saved_steps

    if text is None:
        return [None]
    there = saved_steps(run)
    try:
        wanted = there if text == "all" else [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--step '{text}' is not understood; valid: a number, several with commas, or all") from None
    lacking = [step for step in wanted if step not in there]
    if lacking or not wanted:
        what = f"no checkpoint of step {lacking[0]}" if lacking else "no checkpoint"
        listed = ", ".join(map(str, there)) or "none"
        raise UserError(f"{what} in {run / 'checkpoints'}; steps there: {listed}")
    return list(wanted)


def evaluate_here(todo: list[list[str]]) -> int:
    """Run commands one after the other; return the first failing one's exit code, after all had their turn."""
    from launchers.cluster.allocation import without_ranks

    code = 0
    for command in todo:
        print(f"+ {shlex.join(command)}", flush=True)
        code = code or subprocess.run(command, cwd=ROOT, env=without_ranks(), check=False).returncode
    return code


def evaluate_in_jobs(
    run: Path, tasks: list[str], steps: list[int], overrides: list[str], options: JobOptions
) -> dict[str, Work]:
    """Submit a job for each task and step; return what each does."""
    from launchers.cluster import evaluations

    work = [
        evaluations.Work(task, step, tuple(command[1:]))
        for step in steps
        for task, command in zip(dict.fromkeys(tasks), commands(run, tasks, step, overrides), strict=True)
    ]
    return evaluations.submit(run.resolve(), work, options)


def watch(run: Path, tasks: list[str], evaluate: Callable[[list[int]], bool], seconds: float) -> None:
    """Call ``evaluate`` with the steps of each new checkpoint until the run has saved its last one, or has stopped.

    Checkpoints that have results of all tasks already are left out. Where ``evaluate`` returns False, the same steps
    are tried again at the next look.
    """
    from launchers.cluster.evaluations import evaluated_steps, new_steps, why_stopped
    from launchers.cluster.progress import is_over

    seen = evaluated_steps(run, tasks)
    if seen:
        print(f"evaluated before: step {', '.join(map(str, sorted(seen)))}; --step N repeats one", flush=True)
    while True:
        # Before the look at the checkpoints: the last one is not to be missed.
        stopped = why_stopped(run)
        over = bool(stopped) or is_over(run)
        steps = new_steps(run, seen)
        done = not steps or evaluate(steps)
        if done:
            seen.update(steps)
        if over and done:
            if stopped:
                print(f"{run} has stopped ({stopped}): there is nothing more to wait for", flush=True)
            return
        time.sleep(seconds)


def await_start(run: Path, seconds: float) -> None:
    """Wait for a run of which there is only a submitted job so far."""
    said = False
    while not (run / "config.yaml").is_file() and (run / "slurm" / "jobs").is_dir():
        if not said:
            print(f"{run} has not started yet: waiting for its job", flush=True)
        said = True
        time.sleep(seconds)


def show_leaderboard(run: Path) -> None:
    """Complete the run's leaderboard and print it."""
    from eval.results import measured_on
    from launchers.cluster.evaluations import gather

    for line in gather(run):
        what = f"{line['task']:<12} {line['backbone']:<10} {line['metric']:<16} {line['value']}"
        print(f"step {line['step']:>8}  {what}  {measured_on(line)}")


def main() -> int:
    """Run the command line; return the first failing task's exit code, after all others had their turn."""
    arguments = _parser().parse_intermixed_args()
    # `--tasks` takes all words that follow, so the overrides may have ended up among them.
    words = [*arguments.tasks, *arguments.overrides]
    tasks, overrides = [word for word in words if "=" not in word], [word for word in words if "=" in word]
    run = arguments.run
    if arguments.watch and arguments.step:
        raise UserError("--watch evaluates each new checkpoint; leave out --step")
    check_tasks(tasks)
    here = False
    try:
        if arguments.watch and not arguments.dry_run:
            from launchers.cluster.evaluations import SECONDS

            await_start(run, SECONDS)
        commands(run, tasks, None, overrides)  # what is wrong is said before anything else
        steps = _steps(run, arguments.step)
        if arguments.dry_run:
            for command in [command for step in steps for command in commands(run, tasks, step, overrides)]:
                print(f"+ {shlex.join(command)}")
            return 0
        if here := _stays_here(arguments):
            return _here(arguments.watch, run, tasks, overrides, steps)
        return _as_jobs(arguments, run, tasks, overrides, steps)
    except KeyboardInterrupt:
        if here:
            raise
        print("\ninterrupted; jobs that were submitted go on", flush=True)
        return 0 if arguments.watch or arguments.follow else 128 + signal.SIGINT


def _stays_here(arguments: argparse.Namespace) -> bool:
    if arguments.local:
        return True
    from launchers.cluster.controller import there_is_a_cluster

    try:
        if there_is_a_cluster():
            return False
    except UserError as error:
        # Evaluations would take a login node that people share.
        raise UserError(f"{error}\nor evaluate on this machine with --local") from None
    options = [f"--{name.replace('_', '-')}" for name in given_options(arguments)]
    if arguments.follow or options:
        raise UserError(
            f"there is no SLURM here, so {' '.join(['--follow'] * arguments.follow + options)} means nothing; "
            "leave it out, or say --local"
        )
    return True


def _here(watching: bool, run: Path, tasks: list[str], overrides: list[str], steps: list[int | None]) -> int:
    if not watching:
        return evaluate_here([command for step in steps for command in commands(run, tasks, step, overrides)])
    from launchers.cluster.evaluations import SECONDS

    codes: list[int] = []

    def evaluate(found: list[int]) -> bool:
        codes.extend(evaluate_here(commands(run, tasks, step, overrides)) for step in found)
        return True

    watch(run, tasks, evaluate, SECONDS)
    return next((code for code in codes if code), 0)


def _as_jobs(
    arguments: argparse.Namespace, run: Path, tasks: list[str], overrides: list[str], steps: list[int | None]
) -> int:
    from launchers.cluster import evaluations, progress
    from launchers.cluster.options import job_options

    options = job_options(arguments, not_of_site=evaluations.OF_TRAINING)
    jobs: dict[str, Work] = {}

    def evaluate(found: list[int]) -> bool:
        try:
            jobs.update(evaluate_in_jobs(run, tasks, found, overrides, options))
        except UserError as error:
            if not jobs:
                raise
            # It worked before: a controller that is away for a moment must not end hours of watching.
            print(f"{error}; trying again", flush=True)
            return False
        return True

    if arguments.watch:
        watch(run, tasks, evaluate, evaluations.SECONDS)
    else:
        newest = progress.saved_steps(run)[-1:]
        if not newest:
            raise UserError(f"no checkpoint in {run / 'checkpoints'}; --watch waits for the first")
        evaluate([newest[0] if step is None else step for step in steps])
    if not (arguments.follow or arguments.watch):
        return 0
    failed = evaluations.follow(jobs, lambda text: print(text, flush=True))
    show_leaderboard(run)
    for job in failed:
        print(f"{jobs[job]} failed: see job {job} in {run / 'slurm'}", file=sys.stderr)
    return EXIT_FAILED if failed else 0


if __name__ == "__main__":
    run_cli(main)
