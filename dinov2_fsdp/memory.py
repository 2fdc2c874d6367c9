"""Memory that a process has freed, and objects that it keeps: what both cost when they are gone through again."""

from __future__ import annotations

import ctypes
import gc
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


def prepare_worker() -> None:
    """Make ready a process that turns images into crops over and over: the same pages, and no search of what stays.

    What is there before the first image, hundreds of thousands of objects of libraries' and the parent's, would be
    looked through for garbage again and again, and memory shared with the parent be copied by that.
    """
    keep_freed_memory()
    gc.freeze()
