"""Compiled code for a CPU, loaded where it was built: setup.py builds it if there is a C++ compiler.

Nothing needs it. Every function that calls it has the same in torch beside it, which runs elsewhere, and with which
tests compare it. ``DINOV2_FSDP_NATIVE=off`` in the environment does without it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

SWITCH = "DINOV2_FSDP_NATIVE"

VARIANTS = {"AVX512": ("_amx", "_avx512_bf16", "_avx512_vnni", "_avx512"), "AVX2": ("_avx2",)}
"""The modules that setup.py builds for what torch says that the processor can, the best first."""

_INT, _INDEX, _FLOAT, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p

_ARGUMENTS = {
    # Whether tensors are bfloat16 rather than float32 where both are taken, addresses and numbers: see the sources.
    "gelu": (_INT, _POINTER, _POINTER, _INDEX, _INDEX, _POINTER, _POINTER),
    "gelu_backward": (_INT, _INT, _POINTER, _POINTER, _POINTER, _INDEX, _INDEX, _POINTER),
    "sum_rows": (_INT, _POINTER, _INDEX, _INDEX, _POINTER),
    "norm": (_INT, _POINTER, _POINTER, _POINTER, _FLOAT, _INDEX, _INDEX, _POINTER, _POINTER, _POINTER),
    "norm_backward": (_INT, *[_POINTER] * 6, _INDEX, _INDEX, _POINTER, _POINTER),
    "softmax": (_INT, _POINTER, _POINTER, _INDEX, _INDEX),
    "softmax_backward": (_POINTER, _POINTER, _INDEX, _INDEX),
    "split_heads": (_INT, _POINTER, *[_INDEX] * 5, _FLOAT, _POINTER),
    "join_heads": (_INT, _POINTER, *[_INDEX] * 5, _FLOAT, _INT, _POINTER),
    "take_rows": (_INT, _POINTER, _INDEX, _POINTER, _INDEX, _POINTER, _POINTER),
    "add_to_rows": (_INT, _POINTER, *[_INDEX] * 2, _POINTER, _INDEX, *[_POINTER] * 3),
    "transpose": (_INT, _POINTER, *[_INDEX] * 3, _POINTER),
    "square_sum": (_POINTER, _INDEX, _POINTER),
    "adamw": (*[_POINTER] * 4, _INDEX, *[_FLOAT] * 8),
}

_WITH_AVX512 = {
    "attention": (_INT, _POINTER, *[_INDEX] * 4, _FLOAT, _POINTER),
    "attention_backward": (_INT, _POINTER, _POINTER, *[_INDEX] * 4, _FLOAT, _POINTER),
    "attention_of": (_INT, *[_POINTER] * 3, *[_INDEX] * 4, _FLOAT, _POINTER),
    "attention_of_backward": (_INT, *[_POINTER] * 4, *[_INDEX] * 4, _FLOAT, *[_POINTER] * 2),
    "norm_linear": (
        *(_INT, *[_POINTER] * 3, *[_INDEX] * 2, *[_POINTER] * 2, _FLOAT, *[_POINTER] * 2, _INDEX),
        *[_POINTER] * 3,
    ),
    "norm_linear_backward": (_INT, *[_POINTER] * 3, *[_INDEX] * 3, *[_POINTER] * 11),
    "scaled_linear": (_INT, _POINTER, *[_INDEX] * 2, *[_POINTER] * 3, _INDEX, *[_POINTER] * 4),
    "scaled_linear_backward": (_INT, *[_POINTER] * 4, *[_INDEX] * 2, *[_POINTER] * 3, _INDEX, *[_POINTER] * 4),
    "copy_others": (_INT, _POINTER, *[_INDEX] * 2, _POINTER, _INDEX, _POINTER),
    "crops": (_POINTER, _INDEX, _INDEX, _POINTER),
    "product_of_rows": (_INT, *[_POINTER] * 2, *[_INDEX] * 3, _POINTER),
    "feed_forward": (
        *(_INT, *[_POINTER] * 4, *[_INDEX] * 3, *[_POINTER] * 2, _FLOAT, *[_POINTER] * 5, _INT),
        *[_POINTER] * 4,
    ),
    "feed_forward_backward": (
        *(_INT, *[_POINTER] * 4, *[_INDEX] * 3, *[_POINTER] * 6, _INT, *[_POINTER] * 3),
        *[_POINTER] * 8,
    ),
}

_log = logging.getLogger(__name__)
_switched_off = False


class NotHere(Exception):
    """The processor or Linux does not have what a variant was built for."""


class Library:
    """The functions of one variant, by their names without prefix."""

    def __init__(self, path: Path) -> None:
        self.variant = path.name.partition(".")[0].strip("_")
        self._loaded = ctypes.CDLL(str(path))
        self._loaded.dinov2_source.restype = ctypes.c_char_p
        if self._loaded.dinov2_source() != source():
            raise OSError(f"{path} was built from other code")
        if not self._loaded.dinov2_runs_here():
            raise NotHere
        self.has_branches = bool(self._loaded.dinov2_has_branches())
        self.multiplies_bf16 = bool(self._loaded.dinov2_multiplies_bf16())
        self.has_tiles = bool(self._loaded.dinov2_has_tiles())
        self._arguments = {**_ARGUMENTS, **(_WITH_AVX512 if self.has_branches else {})}
        self.names = tuple(self._arguments)
        """The functions there are."""
        for name in self.names:
            getattr(self, name)
        self._loaded.dinov2_widest_row.restype = _INDEX
        self.widest_row: int = self._loaded.dinov2_widest_row()

    def threads(self) -> int | None:
        """Return what tells the library of its threads from another, see :func:`parallel_library`."""
        return _threads_of(self._loaded)

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_") or name not in self._arguments:
            raise AttributeError(name)
        function = getattr(self._loaded, f"dinov2_{name}")
        function.argtypes, function.restype = self._arguments[name], None
        setattr(self, name, function)
        return cast(Callable[..., None], function)


def source() -> bytes:
    """Return the fingerprint of the code as it lies here, which setup.py compiles into what it builds."""
    sources = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".cpp", ".h"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest().encode()


def library() -> Library | None:
    """Return what was compiled for this processor, None where that is nothing, or switched off."""
    return None if _switched_off else _load()


def parallel_library() -> Library | None:
    """Return :func:`library` if its threads are torch's own: two sets of them would fight for the processor's cores.

    They are not where torch or this was built with another OpenMP library than GCC's.
    """
    return library() if _shares_threads() else None


def variant() -> str:
    """Return the name of what is used, ``none`` without."""
    found = parallel_library()
    return found.variant if found else "none"


def has_memory(tensor: Tensor) -> bool:
    """Return whether a tensor has memory of its own on a CPU, which can be read at once.

    A subclass has not, be it one of a trace: only torch knows what it stands for.
    """
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu"


def is_row_of_fp32(tensor: Tensor) -> bool:
    """Return whether compiled code that takes one float32 value after the other can take a tensor."""
    return has_memory(tensor) and tensor.dtype == torch.float32 and tensor.is_contiguous()


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
    if os.environ.get(SWITCH, "").lower() in ("0", "off", "no", "false"):
        return None
    return next(all_that_run_here(), None)


def all_that_run_here() -> Iterator[Library]:
    """Load one variant after the other of those for this processor, the best first."""
    for name in VARIANTS.get(torch.backends.cpu.get_cpu_capability(), ()):
        path = Path(__file__).with_name(f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}")
        if not path.exists() or (name in ("_amx", "_avx512_bf16") and not _has_bf16()):
            continue
        try:
            yield Library(path)
        except NotHere:
            continue
        except (OSError, AttributeError) as error:  # of another system, or of other code than lies here
            _log.warning("compiled code is left alone, install this project again or delete %s: %s", path, error)


def _has_bf16() -> bool:
    # Not a public function: a torch that has none gets what needs no such instructions.
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


@functools.cache
def _shares_threads() -> bool:
    """Return whether both have their threads from one library: other packages may bring more of the same."""
    found = _load()
    torchs = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return found is not None and found.threads() == _threads_of(ctypes.CDLL(str(torchs), os.RTLD_NOLOAD))
    except (OSError, AttributeError):  # a torch that is built otherwise
        return False


def _threads_of(loaded: ctypes.CDLL) -> int | None:
    """Return the address of a function of the OpenMP library that a library is linked with."""
    return ctypes.cast(loaded.omp_get_max_threads, ctypes.c_void_p).value
