"""What can go wrong with a job is said before it is submitted. No torch."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dinov2_fsdp.config import Config
from dinov2_fsdp.errors import UserError, nearest
from launchers.cluster.controller import NodeKind, partitions
from launchers.cluster.submission import Demand

_OF_ONE_MACHINE = ("tmpfs", "ramfs", "devtmpfs", "squashfs")
_LOCAL = ("ext2", "ext3", "ext4", "xfs", "btrfs", "overlay", "zfs", "f2fs", "apfs")


def check_partition(demand: Demand) -> list[str]:
    """Compare a job with the partitions that it may go to, and return what is worth knowing.

    Raises:
        UserError: a partition does not exist, or each of them is down or has nothing that large.
    """
    kinds, options = partitions(), demand.options
    names = list(dict.fromkeys(kind.partition for kind in kinds))
    if not names:
        raise UserError("this cluster shows no partition to you; ask its administrators for access")
    notes, refusals = [], []
    asked = (options.partition or _default(kinds)).split(",")
    for name in asked:
        mine = [kind for kind in kinds if kind.partition == name]
        if not mine:
            raise UserError(f"partition '{name}' does not exist{nearest(name, names)}\nvalid: {', '.join(names)}")
        try:
            if not any(kind.up for kind in mine):
                raise UserError(f"partition '{name}' is down; up are: {', '.join(_up(kinds)) or 'none'}")
            _check_size(demand, name, mine)
            notes += _check_time(demand, name, mine)
        except UserError as error:
            refusals.append(error)
    if len(refusals) == len(asked):
        raise refusals[0]
    # SLURM starts a job in the first partition of a list that can take it.
    return [*notes, *(f"not in every partition: {error}" for error in refusals)]


def _default(kinds: list[NodeKind]) -> str:
    found = [kind.partition for kind in kinds if kind.default]
    if not found:
        names = ", ".join(dict.fromkeys(kind.partition for kind in kinds))
        raise UserError(f"this cluster has no default partition; use --partition with one of: {names}")
    return found[0]


def _up(kinds: list[NodeKind]) -> list[str]:
    return list(dict.fromkeys(kind.partition for kind in kinds if kind.up))


def _check_size(demand: Demand, name: str, kinds: list[NodeKind]) -> None:
    nodes = sum(kind.nodes for kind in kinds)
    if demand.options.nodes > nodes:
        raise UserError(f"--nodes {demand.options.nodes}: partition '{name}' has {nodes}")
    gpus = max(kind.gpus for kind in kinds)
    if demand.gpus > gpus:
        way_out = f"--gpus-per-node {gpus}" if gpus else "another --partition, or parallel.device=cpu"
        raise UserError(f"{demand.gpus} GPUs per node: the nodes of partition '{name}' have {gpus}; use {way_out}")
    cpus = max(kind.cpus for kind in kinds)
    if demand.tasks * demand.cpus > cpus:
        fitting = cpus // demand.tasks
        way_out = f"--cpus-per-gpu {fitting} data.workers={fitting}" if fitting else f"--tasks-per-node {cpus}"
        raise UserError(
            f"{demand.tasks} ranks × {demand.cpus} cores per node: the nodes of partition '{name}' have {cpus}; "
            f"use {way_out}"
        )
    enough = sum(k.nodes for k in kinds if k.gpus >= demand.gpus and k.cpus >= demand.tasks * demand.cpus)
    if demand.options.nodes > enough:
        raise UserError(f"--nodes {demand.options.nodes}: only {enough} nodes of partition '{name}' are that large")


def _check_time(demand: Demand, name: str, kinds: list[NodeKind]) -> list[str]:
    limits = [kind.minutes for kind in kinds]
    minutes = demand.options.minutes
    if None in limits:
        return []
    limit = max(limit for limit in limits if limit is not None)
    if minutes is not None and minutes > limit:
        raise UserError(
            f"--time {demand.options.time}: partition '{name}' allows {limit} minutes; "
            f"use --time {limit} or less, and the job requeues itself until the run is done"
        )
    return [f"partition '{name}' ends a job after {limit} minutes; it saves, requeues itself and goes on"]


def check_shared(path: Path, mounts: Path = Path("/proc/mounts")) -> list[str]:
    """Return what the file system below ``path`` lets fear.

    Raises:
        UserError: it is the memory of this machine.
    """
    kind = file_system(path, mounts)
    if kind in _OF_ONE_MACHINE:
        raise UserError(f"output_dir={path} lies in this machine's memory ({kind}), which no node sees; choose another")
    if kind in _LOCAL:
        return [f"{path} lies on {kind}, which other machines see only if this one exports it"]
    return []


def file_system(path: Path, mounts: Path = Path("/proc/mounts")) -> str | None:
    """Return the kind of file system that holds ``path``, or None where the system does not say."""
    existing = path.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        lines = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return None
    best, kind = -1, None
    for _, point, found, *_ in lines:
        mount = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), point)
        inside = str(existing.resolve()) == mount or str(existing.resolve()).startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= best:
            best, kind = len(mount), found
    return kind


def images_of(config: Config) -> int | None:
    """Return how many images the data set holds, where this costs nothing: a large folder takes minutes to list."""
    from dinov2_fsdp.data.sources import open_source

    return len(open_source(config.data.train)) if config.data.train.startswith("scenes:") else None


def missing_data(config: Config) -> str | None:
    """Return the place of the training data that is not to be seen from here, or None.

    Raises:
        UserError: the data source is of no known kind.
    """
    kind, _, place = config.data.train.partition(":")
    if kind == "scenes":
        return None
    if kind not in ("folder", "tar", "imagenet", "imagenet22k"):
        from dinov2_fsdp.data.sources import open_source

        open_source(config.data.train)
    path = place.partition("#")[0]
    if kind == "imagenet":
        path = path.removesuffix(":train").removesuffix(":val")
    # Of a pattern, the folder that it starts from.
    fixed = re.split(r"[*?\[{]", os.path.expanduser(path))[0]
    where = Path(fixed if fixed == os.path.expanduser(path) else os.path.dirname(fixed) or ".")
    return None if where.exists() else str(where)
