"""What SLURM tells a job about itself: read from the environment here, and nowhere else. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from dinov2_fsdp.parallel.place import LIFE, Place

_LEFTOVERS = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_")
_RANKS = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT",
    LIFE,
)  # fmt: skip
_DEVICES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
_SITE = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
"""Variables that say where the cluster is, not which job this is."""


@dataclass(frozen=True)
class Allocation:
    """A job as its batch script and its ranks see it."""

    job: str
    """As shown to people: ``123``, or ``123_4`` in an array."""
    number: str
    """As commands take it, unique also within an array."""
    restarts: int
    """How often SLURM has started this job again."""
    member: int
    """Index within the array; 0 outside of one."""
    nodes: tuple[str, ...]
    tasks_per_node: int


def allocation_from_environment(environment: Mapping[str, str] = os.environ) -> Allocation:
    """Return the job that this process belongs to.

    Raises:
        KeyError: it belongs to none.
    """
    from submitit.slurm.slurm import SlurmJobEnvironment

    number = environment["SLURM_JOB_ID"]
    member = environment.get("SLURM_ARRAY_TASK_ID")
    job = number if member is None else f"{environment['SLURM_ARRAY_JOB_ID']}_{member}"
    nodes = tuple(SlurmJobEnvironment().hostnames)
    tasks = int(environment.get("SLURM_NTASKS", len(nodes)))
    restarts = int(environment.get("SLURM_RESTART_COUNT", 0))
    return Allocation(job, number, restarts, int(member or 0), nodes, tasks // len(nodes))


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """Return what SLURM calls this node."""
    return environment.get("SLURMD_NODENAME", "") or os.uname().nodename


def place_in_job(
    address: str, port: int, life: int | None = None, environment: Mapping[str, str] = os.environ
) -> Place:
    """Return where this task of a job step stands among the ranks."""
    size, nodes = int(environment["SLURM_NTASKS"]), int(environment["SLURM_NNODES"])
    rank, local = int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"])
    return Place(rank, size, local, size // nodes, address, port, life)


def meeting_point(environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Return rank 0's address and port, as the batch script has set them."""
    return environment["MASTER_ADDR"], int(environment["MASTER_PORT"])


def life_from_environment(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of this life of the run, as the batch script has set it."""
    return int(environment[LIFE])


def without_job(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment without what a surrounding job or launcher has put there.

    A job submitted from inside another one would inherit its nodes, its ranks and its GPUs.
    """
    inside = "SLURM_JOB_ID" in environment or "RANK" in environment
    return {
        key: value
        for key, value in environment.items()
        if key in _SITE or not (key.startswith(_LEFTOVERS) or (inside and key in (*_RANKS, *_DEVICES)))
    }


def without_ranks(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment for a process that is on its own although it was started by one rank of several."""
    return {key: value for key, value in environment.items() if key not in _RANKS}
