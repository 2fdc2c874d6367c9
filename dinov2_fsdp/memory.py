"""How much memory a process may take, and what it does with what it has freed."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Of ``malloc.h``."""


def keep_freed_memory() -> None:
    """Let this process use freed memory again, up to half a GiB of it, instead of asking for new pages in every step.

    A new page costs a CPU as long as thousands of multiplications. Where the C library is not glibc, nothing happens.
    """
    if os.name == "posix" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes
        library.mallopt(_TRIM_THRESHOLD, 512 << 20)


def machine_memory(root: Path = Path("/")) -> float:
    """Return the bytes of memory that this process can have at most: the machine's, or less in a control group.

    Containers and SLURM set such a limit, on a group or on one above it (Linux, cgroup versions 1 and 2).

    Args:
        root: of the file system that says so.
    """
    least = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        groups = (root / "proc/self/cgroup").read_text(errors="surrogateescape").splitlines()
    except OSError:  # not Linux, or without control groups
        return least
    for line in filter(None, groups):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        # Within a container a group may be named as outside, where it cannot be seen: the top is the container's then.
        group = Path(path.lstrip("/"))
        for above in (group, *group.parents):
            try:
                limit = (top / above / name).read_text().strip()
            except OSError:
                continue
            if limit.isdecimal():  # "max" is no limit
                least = min(least, float(limit))
    return least
