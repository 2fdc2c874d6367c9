"""How much memory a process may take, and what it does with what it has freed."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Of ``malloc.h``."""
_GROUP = re.compile(r"\d+:([^:]*):(.*)")
"""A line of ``/proc/self/cgroup``: controllers (none: version 2) and the group."""
_MOUNT = re.compile(r"[^ ]+ [^ ]+ [^ ]+ ([^ ]+) ([^ ]+) .* - (cgroup2?) [^ ]* ([^ ]+)")
"""A line of ``/proc/self/mountinfo``: the group that is mounted, where, the version, and options with controllers."""


def keep_freed_memory() -> None:
    """Let this process use freed memory again, up to half a GiB of it, instead of asking for new pages in every step.

    A new page costs a CPU as long as thousands of multiplications. Where the C library is not glibc, nothing happens.
    """
    if os.name == "posix" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes
        library.mallopt(_TRIM_THRESHOLD, 512 << 20)


def machine_memory(root: Path = Path("/")) -> float:
    """Return the bytes of memory that this process can have at most: the machine's, or less in a control group.

    Containers and SLURM set such a limit, on a group or on one above it (Linux, cgroup versions 1 and 2). Beyond
    ``memory.high`` a process is slowed until it hardly moves, so that is a limit too. What cannot be read sets none.

    Args:
        root: of the file system that says so.
    """
    least = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for top, group, names in _control_groups(root / "proc/self"):
        # Within a container a group may be named as outside, where it cannot be seen: the top is the container's then.
        for file in (root / top / above / name for above in (group, *group.parents) for name in names):
            try:
                limit = file.read_text().strip()
            except (OSError, ValueError):
                continue
            if limit.isdecimal():  # "max" is no limit
                least = min(least, float(limit))
    return least


def _control_groups(process: Path) -> Iterator[tuple[str, Path, tuple[str, ...]]]:
    """Yield where control groups that limit memory are mounted, the process's group below that, and the limits' files.

    Args:
        process: its folder in ``/proc``.
    """
    try:
        groups = (process / "cgroup").read_text(errors="surrogateescape").split("\n")
        mounts = (process / "mountinfo").read_text(errors="surrogateescape").split("\n")
    except OSError:  # not Linux, or without control groups
        return
    named = {found[1]: Path(found[2]) for line in groups if (found := _GROUP.fullmatch(line))}
    memory = next((group for controllers, group in named.items() if "memory" in controllers.split(",")), None)
    for line in mounts:
        if (mount := _MOUNT.fullmatch(line)) is None:
            continue
        below, top = (re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), mount[part]) for part in (1, 2))
        names: tuple[str, ...] = ("memory.max", "memory.high")
        group = named.get("")
        if mount[3] == "cgroup":
            names = ("memory.limit_in_bytes",)
            group = memory if "memory" in mount[4].split(",") else None
        if group is not None and group.is_relative_to(below):
            yield top.lstrip("/"), group.relative_to(below), names
        elif group is not None and ".." in Path(below).parts:
            # Mounted from outside of this process's namespace: the top is above all groups that are seen here.
            yield top.lstrip("/"), Path(), names
