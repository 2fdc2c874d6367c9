"""Questions to the cluster, each under a time limit: a controller that is down must not hang a command."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from dinov2_fsdp.errors import UserError

PATIENCE = 20.0
"""Seconds that a command may take."""
ACTIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "RESIZING",
          "SIGNALING", "STAGE_OUT", "STOPPED", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")  # fmt: skip
_UNREACHABLE = re.compile(
    r"unable to contact slurm controller|connection refused|zero bytes were transmitted|socket timed out|munge|"
    r"could not establish a configuration source|connect failure",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class NodeKind:
    """Equal nodes of a partition."""

    partition: str
    default: bool
    up: bool
    minutes: int | None
    nodes: int
    cpus: int
    gpus: int


_NO_CLUSTER = re.compile(r"resolve_ctls_from_dns_srv|could not establish a configuration source", re.IGNORECASE)
"""What the commands say that are installed on a machine of no cluster."""


def there_is_a_cluster() -> bool:
    """Return whether this machine belongs to a SLURM cluster.

    Raises:
        UserError: it does, but nobody answers.
    """
    if shutil.which("sbatch") is None:
        return False
    try:
        return ask("sinfo", "--noheader").returncode == 0
    except UserError as error:
        if _NO_CLUSTER.search(str(error)):
            return False
        raise


def reachable() -> bool:
    """Return whether there is a SLURM here that answers."""
    try:
        return there_is_a_cluster()
    except UserError:
        return False


def ask(*command: str) -> subprocess.CompletedProcess[str]:
    """Return a finished command of SLURM, whatever its exit code.

    Raises:
        UserError: it does not exist here, or the controller does not answer.
    """
    if shutil.which(command[0]) is None:
        raise UserError(
            f"{command[0]} is not on PATH, so this is no login node of a SLURM cluster\n"
            "use launchers/local.py here, or --dry-run to see what would be submitted"
        )
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"SLURM's controller does not answer: `{command[0]}` took more than {PATIENCE:.0f} s; try `scontrol ping`"
        ) from None
    if result.returncode and _UNREACHABLE.search(result.stderr):
        reason = _first_line(result.stderr)
        raise UserError(f"SLURM's controller does not answer: {reason}; try `scontrol ping`")
    return result


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else "no reason given"


def partitions() -> list[NodeKind]:
    """Return the kinds of nodes of each partition.

    Raises:
        UserError: the cluster does not say.
    """
    result = ask("sinfo", "--noheader", "-o", "%P|%a|%l|%D|%c|%G")
    if result.returncode:
        raise UserError(f"sinfo failed: {_first_line(result.stderr)}")
    kinds = []
    for line in result.stdout.splitlines():
        name, state, limit, nodes, cpus, gres = line.strip().split("|")
        gpus = sum(int(found) for found in re.findall(r"gpu(?::[^:,(]+)?:(\d+)", gres))
        kinds.append(
            NodeKind(
                name.rstrip("*"),
                name.endswith("*"),
                state == "up",
                _limit(limit),
                int(nodes),
                int(cpus.rstrip("+")),
                gpus,
            )
        )
    return kinds


def _limit(text: str) -> int | None:
    from launchers.cluster.options import parse_minutes

    try:
        return parse_minutes(text)
    except UserError:
        return None  # infinite, or n/a


def states(jobs: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return (state, reason) of the jobs that the cluster still remembers, members of arrays by ``123_4``."""
    if not jobs:
        return {}
    plain = ",".join(dict.fromkeys(job.partition("_")[0] for job in jobs))
    result = ask("squeue", "--noheader", "--array", "--states=all", "-o", "%i|%T|%r", "-j", plain)
    if result.returncode:
        return {}  # "Invalid job id": forgotten
    found = {}
    for line in result.stdout.splitlines():
        job, state, reason = line.strip().split("|", 2)
        found[job] = (state, reason)
    return {job: found[job] for job in jobs if job in found}


def seconds_left(job: str) -> float | None:
    """Return the seconds that a running job has left, or None: no time limit, or SLURM does not say."""
    from launchers.cluster.options import parse_seconds

    try:
        return parse_seconds(ask("squeue", "--noheader", "-o", "%L", "-j", job).stdout)
    except UserError:
        return None


def state_of(job: str) -> str:
    """Return the state of a job in SLURM's words, all of them joined by ``+``; ``UNKNOWN`` if it is forgotten."""
    result = ask("scontrol", "show", "job", job)
    match = re.search(r"JobState=(\S+)", result.stdout)
    return match[1] if match and not result.returncode else "UNKNOWN"


def silent_nodes(nodes: Sequence[str]) -> list[str]:
    """Return those of the nodes that SLURM has lost: down, or no longer responding."""
    result = ask("sinfo", "--noheader", "--Node", "--nodes", ",".join(nodes), "-o", "%N %T")
    listed = [line.split() for line in result.stdout.splitlines()]
    return list(dict.fromkeys(name for name, state in listed if state.endswith("*") or state.startswith("down")))
