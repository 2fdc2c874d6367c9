"""From a command line to submitted training jobs: configs, checks, folders, what is shown. No torch."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dinov2_fsdp.config import Config, load, microbatches_per_rank, to_yaml
from dinov2_fsdp.errors import UserError
from launchers import local
from launchers.cluster import checks, progress, submission
from launchers.cluster.controller import ACTIVE, states
from launchers.cluster.follow import follow
from launchers.cluster.options import DEFAULT_GPUS_PER_NODE, DEFAULT_SIGNAL_SECONDS, JobOptions, job_options
from launchers.cluster.rank import TrainingRank
from launchers.cluster.snapshot import copy_code
from launchers.cluster.submission import AT_START, Demand, Member, Submission


@dataclass(frozen=True)
class Run:
    """One run of the command: its name in messages and its config, all paths absolute."""

    name: str
    config: Config

    @property
    def directory(self) -> Path:
        return Path(self.config.output_dir)


def launch(arguments: argparse.Namespace) -> int:
    """Check, submit and (``--follow``) watch; return the exit code."""
    options = job_options(arguments)
    runs = runs_of(arguments)
    done = [] if arguments.dry_run or arguments.overwrite else [run for run in runs if _is_finished(run)]
    for run in done:
        print(f"{run.directory} is finished; start anew with --overwrite, or choose another --output-dir")
    runs = [run for run in runs if run not in done]
    if not runs:
        return 0
    demand = demand_of(options, runs)
    for run in runs:
        _check_config(run.config, demand)
    if arguments.gpu and not arguments.dry_run:
        raise UserError(f"--gpu {arguments.gpu} is what a plan is for; add --dry-run")
    if arguments.dry_run:
        print(dry_run(demand, runs, arguments.gpu))
        return 0
    active = [(run, jobs[-1]) for run in runs if (jobs := active_jobs(run.directory))]
    if active and arguments.follow:
        for run, job in active:
            print(f"job {job} is at {run.name} already: following it", flush=True)
        return _follow(*zip(*active, strict=True))
    for run, job in active:
        raise UserError(
            f"job {job} is at {run.directory} already\n"
            f"watch it with --follow, or end it with `scancel {job.partition('_')[0]}`"
        )
    notes = checks.check_partition(demand)
    if refused := submission.test_only(submission.render(demand)):
        raise UserError(f"sbatch refuses the job: {refused}")
    # Last, because --overwrite deletes here.
    for run in runs:
        notes += _check_run(run, arguments)
    jobs = submit(demand, runs)
    _show(demand, runs, jobs, list(dict.fromkeys(notes)))
    return _follow(runs, jobs) if arguments.follow else 0


def _is_finished(run: Run) -> bool:
    """Return whether a job would find nothing left to do."""
    saved = run.directory / "config.yaml"
    return saved.is_file() and progress.is_over(run.directory) and not local.differences(load(saved), run.config)


# ---------------------------------------------------------------------------------------------------------------------
# The runs.


def runs_of(arguments: argparse.Namespace) -> list[Run]:
    """Return the runs that a command line asks for: one, or those of ``--array``.

    Raises:
        UserError: a config is wrong, or two runs would share a directory.
    """
    runs = []
    for choice in itertools.product(*(_values(text) for text in arguments.array)):
        files = [text for text in choice if "=" not in text]
        if len(files) > 1 or (files and arguments.config):
            raise UserError(
                f"--array {files[-1]}: a run has one config; leave out {'--config' if arguments.config else files[0]}"
            )
        changed = [text for text in choice if "=" in text]
        config = load(files[0] if files else arguments.config, [*arguments.overrides, *changed])
        directory = Path(arguments.output_dir or config.output_dir).expanduser().absolute()
        if files and arguments.output_dir:
            directory /= Path(files[0]).stem
        if changed:
            directory /= re.sub(r"[^A-Za-z0-9._=+-]+", "_", ",".join(changed))
        submission.check_path(directory)
        name = directory.name if not changed else f"{directory.parent.name}/{directory.name}"
        runs.append(Run(name, dataclasses.replace(config, output_dir=str(directory))))
    directories = [run.directory for run in runs]
    for directory in directories:
        if directories.count(directory) > 1:
            raise UserError(f"two runs of the array would share {directory}; give each config its own output_dir")
    return runs


def _values(text: str) -> list[str]:
    """Return ``key=value`` for each value of ``key=a,b``, or the files of ``a.yaml,b.yaml``."""
    key, separator, values = text.partition("=")
    parts = re.split(r",(?![^\[(]*[\])])", values if separator else text)
    if not all(parts):
        raise UserError(f"--array '{text}' has an empty value; write e.g. --array seed=0,1,2")
    return [f"{key}={part}" for part in parts] if separator else parts


def demand_of(options: JobOptions, runs: list[Run]) -> Demand:
    """Return what the job asks for, with the defaults that follow from the runs.

    Raises:
        UserError: options and configs contradict each other.
    """
    config, directory = runs[0].config, runs[0].directory
    on_cpu = config.parallel.device == "cpu"
    gpus = options.gpus_per_node
    if gpus is None:
        gpus = 0 if on_cpu else DEFAULT_GPUS_PER_NODE
    if on_cpu and gpus:
        raise UserError(f"--gpus-per-node {gpus}: parallel.device=cpu would leave them idle; leave one of both out")
    if gpus == 0 and config.parallel.device == "cuda":
        raise UserError("--gpus-per-node 0: parallel.device=cuda needs GPUs; use parallel.device=cpu or auto")
    tasks = options.tasks_per_node or max(1, gpus)
    if gpus and tasks > gpus:
        raise UserError(f"--tasks-per-node {tasks}: a rank needs a GPU of its own and there are {gpus}")
    minutes = options.minutes
    seconds = options.signal_seconds
    if seconds is None:
        seconds = max(_signal_seconds(run, minutes) for run in runs)
    base = directory if len(runs) == 1 else _base(runs)
    return Demand(
        options,
        gpus,
        tasks,
        options.cpus_per_gpu or max(1, config.data.workers),
        options.mem if options.mem is not None else ("0" if gpus else None),
        seconds,
        runs[0].name if len(runs) == 1 else base.name,
        submission.next_folder(base),
        len(runs),
    )


def _signal_seconds(run: Run, minutes: int | None) -> int:
    return progress.signal_seconds(run.directory, run.config.train.batch, minutes, DEFAULT_SIGNAL_SECONDS)


def _base(runs: list[Run]) -> Path:
    """Return the folder that holds what the runs of an array share."""
    parents = {run.directory.parent for run in runs}
    return parents.pop() if len(parents) == 1 else runs[0].directory.parent


def settled(run: Run, demand: Demand) -> Config:
    """Return the config as the job gets it: with GPUs, none of its ranks is content with a CPU; without, each uses
    the cores that it asked for."""
    parallel = dataclasses.replace(run.config.parallel, device="cuda" if demand.gpus else "cpu")
    if not demand.gpus and not parallel.threads:
        parallel = dataclasses.replace(parallel, threads=demand.cpus)
    return dataclasses.replace(run.config, parallel=parallel)


# ---------------------------------------------------------------------------------------------------------------------
# Checks.


def _check_config(config: Config, demand: Demand) -> None:
    ranks = demand.options.nodes * demand.tasks
    microbatches_per_rank(config, ranks)
    if ranks % config.parallel.replicate:
        valid = [n for n in range(1, ranks + 1) if ranks % n == 0]
        raise UserError(f"parallel.replicate={config.parallel.replicate} does not divide {ranks} ranks; valid: {valid}")


def _check_run(run: Run, arguments: argparse.Namespace) -> list[str]:
    notes = []
    if not arguments.remote_data and (missing := checks.missing_data(run.config)):
        raise UserError(
            f"data.train={run.config.data.train}: {missing} does not exist here\n"
            "where only the nodes see it, add --remote-data"
        )
    start, goes_on = run.config.init.backbone, bool(progress.saved_steps(run.directory)) and not arguments.overwrite
    if start and not (goes_on or arguments.remote_data or Path(start).exists()):
        raise UserError(
            f"init.backbone={start} does not exist here\nwhere only the nodes see it and the data, add --remote-data"
        )
    notes += checks.check_shared(run.directory)
    local.check_start_apart(run.config, arguments.overwrite)
    local.check_run_directory(run.config, arguments.overwrite)
    return notes


def active_jobs(run_dir: Path) -> list[str]:
    """Return the jobs that the cluster still has for a run."""
    jobs = submission.recorded_jobs(run_dir)
    found = states(jobs)
    return [job for job in jobs if job in found and found[job][0] in ACTIVE]


# ---------------------------------------------------------------------------------------------------------------------
# Submission.


def submit(demand: Demand, runs: list[Run]) -> list[str]:
    """Write down what is to run, copy the code, submit; return the job of each run.

    Raises:
        UserError: sbatch refuses, or the folder cannot be written.
    """
    options, folder = demand.options, demand.folder
    try:
        folder.mkdir(parents=True)
        copy_code(folder / "code")
        members = []
        for index, run in enumerate(runs):
            file = folder / f"config_{index}.yaml"
            file.write_text(to_yaml(settled(run, demand)))
            members.append(Member(run.name, str(run.directory), str(file)))
            (run.directory / "logs").mkdir(exist_ok=True)
        written = Submission(
            tuple(members), str(Path.cwd()), options.preflight, options.meet_seconds, options.max_requeues,
            options.max_restarts, options.signal_seconds is None,
        )  # fmt: skip
        written.write(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None
    try:
        jobs = submission.submit(demand, [TrainingRank(str(folder))] * len(runs))
    except UserError:
        shutil.rmtree(folder)
        raise
    for run, job in zip(runs, jobs, strict=True):
        submission.record_job(run.directory, job)
    return jobs


# ---------------------------------------------------------------------------------------------------------------------
# What is shown.


def dry_run(demand: Demand, runs: list[Run], named: str | None = None) -> str:
    """Return the script, the environment and the plan, for a GPU of this name if there is one."""
    from dinov2_fsdp.planner import gpu_of, plan

    gpu = gpu_of(named) if named else None

    ranks = demand.options.nodes * demand.tasks
    kind = "cuda" if demand.gpus else "cpu"
    variables = {**submission.environment(demand), **{name: f"<{text}>" for name, text in AT_START.items()}}
    parts = [
        f"# script\n{submission.render(demand)}",
        "# environment of the ranks",
        *(f"{k}={v}" for k, v in variables.items()),
    ]
    for run in runs:
        title = "# plan" if len(runs) == 1 else f"# plan of {run.name}"
        parts += ["", title, plan(run.config, ranks, kind, checks.images_of(run.config), gpu), _job_lines(demand)]
        if missing := checks.missing_data(run.config):
            parts.append(f"note: {missing} does not exist on this machine")
    return "\n".join(parts)


def _job_lines(demand: Demand) -> str:
    options = demand.options
    where = f"{demand.gpus} GPUs" if demand.gpus else f"{demand.tasks * demand.cpus} cores"
    limit = "the partition's default" if options.time is None else f"{options.minutes} minutes"
    return (
        f"job                  {options.nodes} nodes × {demand.tasks} ranks ({where} each), time limit {limit}\n"
        f"at its time limit    saves {demand.signal_seconds} s before, requeues at most {options.max_requeues} times\n"
        f"after a fault        starts again from the last good checkpoint, at most {options.max_restarts} times"
    )


def _show(demand: Demand, runs: list[Run], jobs: list[str], notes: list[str]) -> None:
    for note in notes:
        print(f"note: {note}")
    number = jobs[0].partition("_")[0]
    log = str(demand.log).replace("%j", number).replace("%A_%a", jobs[0])
    print(f"job {number} submitted: {demand.options.nodes} nodes × {demand.tasks} ranks, {demand.members} run(s)")
    for run, job in zip(runs, jobs, strict=True):
        print(f"  {job}: {run.directory}")
    print(f"log      {log}")
    print("follow   the same command with --follow")
    print(f"cancel   scancel {number}")
    print("resume   the same command again, once the job is over", flush=True)


def _follow(runs: Sequence[Run], jobs: Sequence[str]) -> int:
    members = [(run.name, run.directory, job) for run, job in zip(runs, jobs, strict=True)]
    try:
        return follow(members, show=lambda text: print(text, flush=True))
    except KeyboardInterrupt:
        number = jobs[0].partition("_")[0]
        print(f"\nthe job goes on; --follow shows it again, `scancel {number}` ends it", flush=True)
        return 0
