"""Evaluations as jobs: one for each task and checkpoint, submitted as an array, gathered in the run's leaderboard."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dinov2_fsdp.config import Config, load
from dinov2_fsdp.errors import UserError
from launchers.cluster import checks, submission
from launchers.cluster.allocation import meeting_point, place_in_job
from launchers.cluster.controller import ACTIVE, states
from launchers.cluster.lives import FINISHED, Lives
from launchers.cluster.options import DEFAULT_SIGNAL_SECONDS, JobOptions
from launchers.cluster.progress import saved_steps
from launchers.cluster.snapshot import ROOT, copy_code
from launchers.cluster.submission import Demand

SECONDS = 10.0
"""Between two looks at the jobs, or at the run's checkpoints."""
_PATIENCE = 3
"""Answers in a row without a job after which it counts as gone."""


OF_TRAINING = ("nodes", "gpus_per_node", "tasks_per_node", "mem")
"""Keys of a site's file that say how large the nodes are that a run takes as a whole; an evaluation takes one GPU."""


@dataclass(frozen=True)
class Work:
    """One task on one checkpoint: its command, after the interpreter, from the repository's root."""

    task: str
    step: int
    command: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.task} at step {self.step}"


@dataclass(frozen=True)
class EvaluationRank:
    """The callable that submitit starts on every rank. A preempted evaluation goes on from the features it has kept."""

    code: str
    folder: str
    """Where relative paths count from."""
    command: tuple[str, ...]

    def __call__(self) -> None:
        address, port = meeting_point()
        place = place_in_job(address, port)
        variables = place.to_environment(address, port) if place.world_size > 1 else {}
        script, *arguments = self.command
        code = subprocess.run(
            [sys.executable, str(Path(self.code) / script), *arguments],
            cwd=self.folder if Path(self.folder).is_dir() else None,
            env={**os.environ, "PYTHONPATH": self.code, **variables},
            check=False,
        ).returncode
        if code:
            raise SystemExit(code if code > 0 else 128 - code)

    def checkpoint(self) -> object:
        """Return what submitit submits again after a preemption or a time limit."""
        from submitit.core.utils import DelayedSubmission

        return DelayedSubmission(self)


def submit(run: Path, work: Sequence[Work], options: JobOptions) -> dict[str, Work]:
    """Submit an array with one job for each piece of work; return the work by job.

    Raises:
        UserError: sbatch refuses, or there is no room for the files.
    """
    demand = demand_of(run, load(run / "config.yaml"), len(work), options)
    submission.check_path(run)
    for note in checks.check_partition(demand):
        print(f"note: {note}")
    if refused := submission.test_only(submission.render(demand)):
        raise UserError(f"sbatch refuses the job: {refused}")
    try:
        demand.folder.mkdir(parents=True)
        copy_code(demand.folder / "code")
    except OSError as error:
        raise UserError(f"{demand.folder} cannot be written: {error.strerror}") from None
    ranks = [EvaluationRank(str(demand.folder / "code"), str(ROOT), piece.command) for piece in work]
    jobs = dict(zip(submission.submit(demand, ranks), work, strict=True))
    print(f"job {next(iter(jobs)).partition('_')[0]} submitted: {len(jobs)} evaluation(s), logs in {demand.folder}")
    for job, piece in jobs.items():
        print(f"  {job}: {piece}", flush=True)
    return jobs


def demand_of(run: Path, config: Config, members: int, options: JobOptions) -> Demand:
    """Return what evaluations ask for: one GPU each, or one process where the run was trained on CPUs."""
    on_cpu = config.parallel.device == "cpu"
    gpus = options.gpus_per_node if options.gpus_per_node is not None else (0 if on_cpu else 1)
    tasks = options.tasks_per_node or max(1, gpus)
    cpus = options.cpus_per_gpu or max(1, config.data.workers)
    seconds = options.signal_seconds or DEFAULT_SIGNAL_SECONDS
    if options.minutes is not None:
        seconds = min(seconds, 15 * options.minutes)
    name, folder = f"eval-{run.name}", submission.next_folder(run)
    return Demand(options, gpus, tasks, cpus, options.mem, seconds, name, folder, members, trains=False)


def follow(jobs: dict[str, Work], show: Callable[[str], None] = print, seconds: float = SECONDS) -> list[str]:
    """Show how the jobs get on until all are over; return those that did not complete."""
    shown: dict[str, str] = {}
    missing: dict[str, int] = {}
    failed = []
    while len(waiting := [job for job in jobs if shown.get(job) != "over"]) > 0:
        try:
            known = states(waiting)
        except UserError as error:
            show(f"{error}; trying again")
            known = {}
        for job in waiting:
            state = known.get(job, ("",))[0]
            missing[job] = 0 if state else missing.get(job, 0) + 1
            if state and state != shown.get(job):
                show(f"{jobs[job]}: job {job} {state.lower()}")
                shown[job] = state
            if (state and state not in ACTIVE) or missing[job] >= _PATIENCE:
                shown[job] = "over"
                if state not in ("COMPLETED", ""):
                    failed.append(job)
        if any(shown.get(job) != "over" for job in jobs):
            time.sleep(seconds)
    return failed


def new_steps(run: Path, seen: set[int]) -> list[int]:
    """Return the steps of a run's complete checkpoints that are not in ``seen``, oldest first."""
    return [step for step in saved_steps(run) if step not in seen]


def evaluated_steps(run: Path, tasks: Sequence[str]) -> set[int]:
    """Return the steps of which results of every one of ``tasks`` are there, whatever their data."""
    # Results of other or part of the data lie in TASK_HASH or TASK_part_HASH; segmentation_ms is another task.
    files = list(run.glob("eval/step_*/*/results.json"))
    found = {
        task: {
            int(f.parts[-3][5:])
            for f in files
            if re.fullmatch(rf"{re.escape(task)}((_part)?_[0-9a-f]{{6}})?", f.parts[-2])
        }
        for task in tasks
    }
    return set.intersection(*found.values()) if found else set()


def why_stopped(run: Path) -> str:
    """Return why a run on a cluster will not go on by itself; empty if it goes on, is finished, or never had a job."""
    lives = Lives(run).all()
    last = lives[-1] if lives else None
    if last is None or last.next != "nothing" or last.outcome == FINISHED:
        return ""
    return f"{last.outcome} at step {last.step}" + (f": {last.cause}" if last.cause else "")


def gather(run: Path) -> list[dict[str, str]]:
    """Make sure that every result of a run is in its leaderboard, and return the leaderboard.

    Jobs on several nodes write it at once, and not every shared file system lets them wait for each other.
    """
    from eval.results import KEY, add_to_leaderboard, data_of, read_leaderboard

    for file in sorted(run.glob("eval/step_*/*/results.json")):
        try:
            results = json.loads(file.read_text())
            line = {name: results[name] for name in ("step", "task", "backbone", "metric")}
            line |= data_of(results)
            value = float(results["value"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # being written, or of a task that stands in no leaderboard
        there = any(all(old.get(name) == str(line[name]) for name in KEY) for old in read_leaderboard(run))
        if not there:
            rounded = round(value, 4 if abs(value) < 10 else 3)
            add_to_leaderboard(run, {**line, "value": rounded, "results": os.path.relpath(file, run)})
    return read_leaderboard(run)
