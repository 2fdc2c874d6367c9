"""What a source lists, as flat arrays in one memory-mapped file.

Millions of names as Python strings would cost gigabytes in every worker and minutes at every start. Here they are
one blob with offsets; all processes of a machine map the same pages, and a pickled source carries only the file's path.
A cached listing is valid as long as nothing that it was made from changed: the modification time of every directory, or
the size and modification time of every tar.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2_fsdp.errors import UserError

log = logging.getLogger(__name__)

_MAGIC = b"DINOLST1"
_ALIGNMENT = 64
_TICK_NS = 50_000_000
_COARSE_TICK_NS = 2_000_000_000

Arrays = Mapping[str, npt.NDArray[Any]]


class Strings:
    """A read-only sequence of byte strings over one blob (uint8) and the end of each string in it (int64)."""

    def __init__(self, blob: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> None:
        self.blob = blob
        self.ends = ends

    @classmethod
    def pack(cls, strings: Iterable[bytes]) -> Strings:
        """Return the given strings, packed."""
        strings = list(strings)
        ends = np.cumsum(np.fromiter(map(len, strings), np.int64, len(strings)), dtype=np.int64)
        return cls(np.frombuffer(b"".join(strings), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        index = range(len(self.ends))[index]
        start = int(self.ends[index - 1]) if index else 0
        return self.blob[start : int(self.ends[index])].tobytes()


class Listing:
    """Everything that a listed source knows without opening an image.

    ``arrays`` holds ``names``/``names_ends``, ``classes``/``classes_ends``, ``labels`` (int32; empty when unlabelled),
    ``watched``/``watched_ends`` with ``stamps`` (n, 2), and what a kind of source adds. ``root`` is the absolute path
    that names are relative to. ``path`` is the file that the arrays are mapped from, None when they are in memory.
    """

    def __init__(self, arrays: Arrays, root: str, started_ns: int, fingerprint: str, path: Path | None = None) -> None:
        self.arrays = arrays
        self.root = root
        self.started_ns = started_ns
        self.fingerprint = fingerprint
        self.path = path
        self.names = Strings(arrays["names"], arrays["names_ends"])
        self.labels: npt.NDArray[np.int32] = arrays["labels"]

    @classmethod
    def build(
        cls,
        *,
        root: str,
        started_ns: int,
        names: Strings,
        classes: Sequence[bytes] | None,
        labels: npt.NDArray[np.int32] | None,
        watched: Strings,
        stamps: npt.NDArray[np.int64],
        extra: Arrays | None = None,
    ) -> Listing:
        """Return a listing in memory. ``started_ns`` is the time before the first thing was looked at."""
        packed = Strings.pack(classes or ())
        content: dict[str, npt.NDArray[Any]] = {
            "names": names.blob,
            "names_ends": names.ends,
            "classes": packed.blob,
            "classes_ends": packed.ends,
            "labels": np.zeros(0, np.int32) if labels is None else labels.astype(np.int32),
            **(extra or {}),
        }
        digest = hashlib.blake2b(digest_size=16)
        for key in sorted(content):
            digest.update(f"{key}:{content[key].shape};".encode())
            digest.update(np.ascontiguousarray(content[key]).data)
        watch: Arrays = {"watched": watched.blob, "watched_ends": watched.ends, "stamps": stamps}
        return cls({**content, **watch}, root, started_ns, digest.hexdigest())

    def __len__(self) -> int:
        return len(self.names)

    def strings(self, name: str) -> Strings:
        """Return the packed strings stored under ``name``."""
        return Strings(self.arrays[name], self.arrays[f"{name}_ends"])

    def class_names(self) -> list[str] | None:
        """Return the classes' names, None when the listing is unlabelled."""
        classes = self.strings("classes")
        return [printable(classes[i]) for i in range(len(classes))] if len(self.labels) else None

    def is_current(self) -> bool:
        """Return whether everything that this listing was made from is as it was.

        File systems stamp in ticks: a change in the very tick that was listed leaves no trace, so a listing that
        was made that soon after the last change is not trusted a second time.
        """
        watched, stamps = self.strings("watched"), self.arrays["stamps"]
        modified = stamps[:, 0]
        tick = np.where(modified % 1_000_000_000 == 0, _COARSE_TICK_NS, _TICK_NS)
        if bool(np.any(modified >= self.started_ns - tick)):
            return False
        try:
            return all(stamp(watched[i]) == tuple(stamps[i].tolist()) for i in range(len(watched)))
        except OSError:
            return False

    def save(self, path: Path) -> None:
        """Write the listing to ``path``; other processes see the old file or all of the new one. Raises OSError."""
        layout: dict[str, dict[str, Any]] = {}
        position = 0
        for name, array in self.arrays.items():
            layout[name] = {"dtype": array.dtype.str, "shape": array.shape, "start": position}
            position += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        facts: dict[str, Any] = {"root": self.root, "started_ns": self.started_ns, "fingerprint": self.fingerprint}
        header = json.dumps({**facts, "arrays": layout}).encode()
        header += b" " * (-(len(_MAGIC) + 8 + len(header)) % _ALIGNMENT)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            os.fchmod(descriptor, 0o644)
            with open(descriptor, "wb") as file:
                file.write(_MAGIC + len(header).to_bytes(8, "little") + header)
                for array in self.arrays.values():
                    file.write(np.ascontiguousarray(array).data)
                    file.write(b"\0" * (-array.nbytes % _ALIGNMENT))
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: Path) -> Listing:
        """Return the listing mapped from ``path``. Raises OSError, or ValueError for a file that is not whole."""
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        prefix = len(_MAGIC) + 8
        if mapped[: len(_MAGIC)] != _MAGIC:
            raise ValueError("not a listing of this version")
        body = prefix + int.from_bytes(mapped[len(_MAGIC) : prefix], "little")
        header = json.loads(mapped[prefix:body])
        arrays: dict[str, npt.NDArray[Any]] = {}
        for name, spot in header["arrays"].items():
            dtype, shape = np.dtype(spot["dtype"]), tuple(spot["shape"])
            count = int(np.prod(shape, dtype=np.int64))
            # An empty array may lie at the end of the file, where frombuffer refuses to look.
            flat = np.frombuffer(mapped, dtype, count, body + spot["start"]) if count else np.zeros(0, dtype)
            arrays[name] = flat.reshape(shape)
        return cls(arrays, header["root"], header["started_ns"], header["fingerprint"], path)


def printable(name: bytes) -> str:
    """Return a path for messages: readable, and printable even when it is not UTF-8."""
    return name.decode("utf-8", "backslashreplace")


def stamp(path: bytes) -> tuple[int, int]:
    """Return the modification time in ns and, for a file, its size in bytes. Raises OSError."""
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size if stat.S_ISREG(status.st_mode) else 0


def default_cache_dir() -> Path | None:
    """Return where listings are kept unless told otherwise, None for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "dinov2_fsdp" / "listings"
    except RuntimeError:
        return None


def cached_listing(key: Sequence[str], build: Callable[[], Listing], cache_dir: Path | None) -> Listing:
    """Return the listing that ``key`` names: the cached one while it is current, else a new one, then cached.

    Without a writable ``cache_dir`` (or with None) the listing stays in memory.
    """
    if cache_dir is None:
        return build()
    digest = hashlib.blake2b("\0".join(key).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    path = cache_dir / f"{digest}.listing"
    listing = _load_if_whole(path)
    if listing is not None and listing.is_current():
        return listing
    listing = build()
    try:
        listing.save(path)
    except OSError as error:
        log.warning("the listing is kept in memory and made anew next time: cannot write %s (%s)", path, error.strerror)
        return listing
    mapped = _load_if_whole(path)
    # Another process may have replaced the file since; what this one listed is what it must serve.
    return mapped if mapped is not None and mapped.fingerprint == listing.fingerprint else listing


def reload_listing(path: Path, fingerprint: str) -> Listing | None:
    """Return the listing of this fingerprint if ``path`` still holds it; the images are not looked at."""
    listing = _load_if_whole(path)
    return listing if listing is not None and listing.fingerprint == fingerprint else None


def _load_if_whole(path: Path) -> Listing | None:
    try:
        return Listing.load(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("ignoring the cached listing %s: %s", path, error)
        return None


class Progress:
    """Says every few seconds how far a long listing got."""

    def __init__(self, what: str, unit: str, interval: float = 5.0) -> None:
        self._what, self._unit, self._interval = what, unit, interval
        self._begun = time.monotonic()
        self._due = self._begun + interval

    def update(self, images: int, places: int) -> None:
        """Report, if it is time, that so many images were found in so many places (directories, tars)."""
        now = time.monotonic()
        if now >= self._due:
            self._due = now + self._interval
            seconds = now - self._begun
            log.info(
                "listing %s: %s images in %s %s, %.0f s", self._what, f"{images:,}", f"{places:,}", self._unit, seconds
            )


def no_images(spec: str, where: str, extensions: Iterable[bytes]) -> UserError:
    """Return the error for a place that exists but holds no image."""
    known = " ".join(extension.decode() for extension in extensions)
    return UserError(f"{spec}: no images in {where}\n  looked for files that end in {known}")
