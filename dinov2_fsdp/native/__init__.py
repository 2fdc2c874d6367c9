"""Compiled code for a CPU, loaded where it was built: setup.py builds it if there is a C++ compiler.

Nothing needs it. Every function that calls it has the same in torch or OpenCV beside it, which runs elsewhere, and
with which tests compare it. ``DINOV2_FSDP_NATIVE=off`` in the environment does without it.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch

SWITCH = "DINOV2_FSDP_NATIVE"

VARIANTS = {"AVX512": "_avx512", "AVX2": "_avx2"}
"""The module that setup.py builds for what torch says that the processor can."""

_INT, _INDEX, _FLOAT, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p

_ARGUMENTS = {
    # Whether tensors are bfloat16 rather than float32, then addresses and numbers, see layers.cpp.
    "gelu": (_INT, _POINTER, _POINTER, _INDEX),
    "gelu_backward": (_INT, _POINTER, _POINTER, _POINTER, _INDEX, _INDEX, _POINTER),
    "sum_rows": (_INT, _POINTER, _INDEX, _INDEX, _INDEX, _POINTER),
    "norm": (_INT, _POINTER, _POINTER, _POINTER, _FLOAT, _INDEX, _INDEX, _POINTER, _POINTER, _POINTER),
    "norm_backward": (_INT, *[_POINTER] * 6, _INDEX, _INDEX, _POINTER, _POINTER),
    "softmax": (_INT, _POINTER, _POINTER, _INDEX, _INDEX),
    "softmax_backward": (_INT, _POINTER, _POINTER, _INDEX, _INDEX),
    "split_heads": (_INT, _POINTER, *[_INDEX] * 5, _FLOAT, _POINTER),
    "join_heads": (_INT, _POINTER, *[_INDEX] * 5, _FLOAT, _INT, _POINTER),
    "transpose": (_INT, _POINTER, *[_INDEX] * 3, _POINTER),
}

_WITH_AVX512 = {
    "attention": (_POINTER, *[_INDEX] * 4, _FLOAT, _POINTER, _POINTER),
    "attention_backward": (_POINTER, _POINTER, _POINTER, *[_INDEX] * 4, _FLOAT, _POINTER),
}

_switched_off = False


class Library:
    """The functions of one variant, by their names without prefix."""

    def __init__(self, path: Path) -> None:
        self.variant = path.name.partition(".")[0].strip("_")
        self._loaded = ctypes.CDLL(str(path))
        self.has_attention = bool(self._loaded.dinov2_has_attention())
        self._arguments = {**_ARGUMENTS, **(_WITH_AVX512 if self.has_attention else {})}
        for name in self._arguments:
            getattr(self, name)
        self._loaded.dinov2_widest_row.restype = _INDEX
        self.widest_row: int = self._loaded.dinov2_widest_row()

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_") or name not in self._arguments:
            raise AttributeError(name)
        function = getattr(self._loaded, f"dinov2_{name}")
        function.argtypes, function.restype = self._arguments[name], None
        setattr(self, name, function)
        return cast(Callable[..., None], function)


def library() -> Library | None:
    """Return what was compiled for this processor, None where that is nothing, or switched off."""
    return None if _switched_off else _load()


def parallel_library() -> Library | None:
    """Return :func:`library` if its threads are torch's own: two sets of them would fight for the processor's cores."""
    return library() if _shares_threads() else None


def variant() -> str:
    """Return the name of what is loaded, ``none`` without."""
    found = library()
    return found.variant if found else "none"


@contextmanager
def switched_off() -> Iterator[None]:
    """Do without compiled code for as long as this lasts."""
    global _switched_off
    before, _switched_off = _switched_off, True
    try:
        yield
    finally:
        _switched_off = before


@functools.cache
def _load() -> Library | None:
    name = VARIANTS.get(torch.backends.cpu.get_cpu_capability())
    if name is None or os.environ.get(SWITCH, "").lower() in ("0", "off", "no"):
        return None
    for path in sorted(Path(__file__).parent.glob(f"{name}.*so")):
        try:
            return Library(path)
        except (OSError, AttributeError):  # of another system, or of older code than this file
            continue
    return None


@functools.cache
def _shares_threads() -> bool:
    if _load() is None:
        return False
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return False
    return len({line.split()[-1] for line in lines if "libgomp" in line}) == 1
