"""What a process does with memory that it has freed."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Of ``malloc.h``."""


def keep_freed_memory() -> None:
    """Let this process use freed memory again, up to half a GiB of it, instead of asking for new pages in every step.

    A new page costs a CPU as long as thousands of multiplications. Where the C library is not glibc, nothing happens.
    """
    if os.name == "posix" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes
        library.mallopt(_TRIM_THRESHOLD, 512 << 20)
