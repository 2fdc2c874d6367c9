"""A job from its options to sbatch: the folder beside the run, the script (rendered by submitit), the submission.

Everything of one submission lies in ``RUN/slurm/NNN``: what is to run, a copy of the code, the script, the logs.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dinov2_fsdp.errors import UserError
from launchers.cluster.allocation import without_job
from launchers.cluster.options import JobOptions

FILE = "submission.json"
_UNPRINTABLE = {"\n": "a line break", "%": "'%'", "\\": "a backslash"}


@dataclass(frozen=True)
class Member:
    """One run of a submission; an array has several."""

    name: str
    run_dir: str
    config: str
    """File of the resolved config."""


@dataclass(frozen=True)
class Submission:
    """What the job's own processes need to know."""

    members: tuple[Member, ...]
    folder: str
    """Where it was submitted from: relative paths of the config count from there."""
    preflight: str
    meet_seconds: float
    max_requeues: int
    max_restarts: int
    watches_clock: bool = True
    """Whether a life may stop earlier than SLURM tells it to, if its own times ask for it."""

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @staticmethod
    def read(folder: Path) -> Submission:
        content = json.loads((folder / FILE).read_text())
        return Submission(**{**content, "members": tuple(Member(**member) for member in content["members"])})


def check_path(path: Path) -> None:
    """Refuse a run directory whose name SLURM would read as something else.

    Raises:
        UserError: it holds a line break, a per cent sign or a backslash.
    """
    for character, name in _UNPRINTABLE.items():
        if character in str(path):
            raise UserError(f"output_dir={str(path)!r} holds {name}, which sbatch cannot have in paths; choose another")


def record_job(run_dir: Path, job: str) -> None:
    """Write down that a job is, or will be, at a run."""
    record = run_dir / "slurm" / "jobs" / job
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(job + "\n")


def recorded_jobs(run_dir: Path) -> list[str]:
    """Return the jobs that have been submitted for a run, oldest first."""
    return [file.name for file in sorted(run_dir.glob("slurm/jobs/*"), key=lambda file: file.stat().st_mtime_ns)]


def next_folder(base: Path) -> Path:
    """Return the folder of the next submission of ``base``; it is not made."""
    taken = [int(path.name) for path in (base / "slurm").glob("[0-9]*") if path.name.isdigit()]
    return base / "slurm" / f"{max(taken, default=0) + 1:03d}"


@dataclass(frozen=True)
class Demand:
    """What a job asks for, all defaults settled."""

    options: JobOptions
    gpus: int
    tasks: int
    """Ranks of each node."""
    cpus: int
    """Cores of each rank."""
    mem: str | None
    signal_seconds: int
    name: str
    folder: Path
    """Of the submission."""
    members: int = 1
    trains: bool = True
    """Whether the script counts the lives of a run and decides what becomes of it."""

    @property
    def log(self) -> Path:
        """File of what the batch script and srun say; holds SLURM's placeholders."""
        return self.folder / ("%A_%a_batch.log" if self.members > 1 else "%j_batch.log")


def environment(demand: Demand) -> dict[str, str]:
    """Return the variables that the script sets for the ranks, beside those that are known at the start only."""
    interface = demand.options.interface
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if interface else ()
    return {
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1" if demand.gpus else str(demand.cpus),
        **{name: str(interface) for name in names},
        **demand.options.env,
    }


AT_START = {
    "MASTER_ADDR": "the first node",
    "MASTER_PORT": "a free port of it, from the job's number",
    "DINOV2_FSDP_LIFE": "how often the run has been started; an earlier life cannot save any more",
    "RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE": "from SLURM, one task per rank",
}
"""Variables that the job itself sets when it starts."""


def parameters(demand: Demand) -> dict[str, Any]:
    """Return the job as submitit's executor takes it."""
    options, folder = demand.options, shlex.quote(str(demand.folder))
    batch = f"{shlex.quote(sys.executable)} -m launchers.cluster.batch"
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment(demand).items()]
    shield = [
        "# SLURM tells ranks and script at once to end: the ranks save, and this script goes on to decide.",
        "trap '' TERM",
    ]
    extra: dict[str, Any] = {
        "requeue": True,
        "output": str(demand.log),
        "error": str(demand.log),
        **{key: value if value != "" else True for key, value in options.slurm.items()},
    }
    return {
        "job_name": demand.name,
        "nodes": options.nodes,
        "ntasks_per_node": demand.tasks,
        # A site may want GPUs or memory to be asked for in another way.
        "gpus_per_node": None if "gpu" in options.slurm.get("gres", "") else demand.gpus or None,
        "cpus_per_task": demand.cpus,
        "mem": options.mem if options.slurm.keys() & {"mem-per-cpu", "mem-per-gpu"} else demand.mem,
        "time": options.minutes,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "constraint": options.constraint,
        "exclude": options.exclude,
        "comment": options.comment,
        "wckey": None,
        "signal_delay_s": demand.signal_seconds,
        "array_parallelism": options.array_parallelism,
        "additional_parameters": extra,
        "setup": [
            *(shield if demand.trains else []),
            *options.setup,
            f"cd {shlex.quote(str(demand.folder / 'code'))} || exit 2",
            *exports,
            f"settings=$({batch} {'begin' if demand.trains else 'meet'} {folder}) || exit $?",
            'eval "$settings"',
        ],
        "srun_args": [
            "--open-mode=append",
            "--kill-on-bad-exit=1",
            "--export=ALL",  # also where the job itself was to get nothing (--slurm export=NONE)
            f"--cpus-per-task={demand.cpus}",  # srun does not inherit it from sbatch since SLURM 22.05
            f"--cpu-bind={options.cpu_bind}",
        ],
        "teardown": [f"{batch} end {folder} $?"] if demand.trains else None,
    }


def executor(demand: Demand) -> Any:
    """Return submitit's executor for a job; it asks nothing of the cluster yet."""
    from submitit.slurm.slurm import SlurmExecutor

    class Executor(SlurmExecutor):
        """submitit's, also where there is no SLURM, to render the script."""

        @classmethod
        def affinity(cls) -> int:
            return 2

    made = Executor(demand.folder, python=demand.options.python)
    made.update_parameters(**parameters(demand))
    return made


def render(demand: Demand) -> str:
    """Return the script for sbatch."""
    made = executor(demand)
    if demand.members > 1:
        made.parameters["map_count"] = demand.members
    return made._make_submission_file_text(made._submitit_command_str, "")


def submit(demand: Demand, ranks: Sequence[Callable[[], None]]) -> list[str]:
    """Submit one job, or an array of several, and return the ids of its members.

    Raises:
        UserError: sbatch refuses it.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    made = executor(demand)
    with only(without_job()):
        try:
            if len(ranks) == 1:
                return [made.submit(ranks[0]).job_id]
            with made.batch():
                jobs = [made.submit(rank) for rank in ranks]
            return [job.job_id for job in jobs]
        except (FailedJobError, FailedSubmissionError) as error:
            raise UserError(f"sbatch refuses the job: {refusal(str(error))}") from None


def test_only(script: str) -> str | None:
    """Return why sbatch would refuse the script, or None."""
    from launchers.cluster.controller import ask

    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file, only(without_job()):
        file.write(script)
        file.flush()
        result = ask("sbatch", "--test-only", file.name)
    return refusal(result.stderr) if result.returncode else None


def refusal(stderr: str) -> str:
    """Return sbatch's reason in one line."""
    lines = [line.strip() for line in stderr.splitlines() if "error:" in line or "unrecognized" in line]
    words = [
        line.split("error: ", 1)[-1] for line in lines if "Batch job submission failed" not in line or len(lines) == 1
    ]
    return "; ".join(dict.fromkeys(words)) or " ".join(stderr.split())[-300:]


@contextmanager
def only(environment: dict[str, str]) -> Iterator[None]:
    """Have exactly these variables for a while."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
