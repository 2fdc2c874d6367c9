"""Images in plain tar files, read in any order without unpacking."""

from __future__ import annotations

import os
import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dinov2_fsdp.data.sources.base import check_size, unreadable
from dinov2_fsdp.data.sources.decoding import IMAGE_EXTENSIONS, BadImage, is_image_name
from dinov2_fsdp.data.sources.listed import ListedSource
from dinov2_fsdp.data.sources.listing import (
    Listing,
    Progress,
    Strings,
    cached_listing,
    log,
    no_images,
    printable,
    stamp,
)
from dinov2_fsdp.data.sources.tar_index import is_safe, members, shard_paths
from dinov2_fsdp.errors import UserError

MAX_OPEN_SHARDS = 64
MAX_CLASSES = 10_000_000
_MAX_CLS_BYTES = 64


class TarSource(ListedSource):
    """Images in tars, shard by shard in the order of their paths, by member name within each."""

    def __init__(self, spec: str, listing: Listing) -> None:
        super().__init__(spec, listing)
        self._shards = listing.strings("watched")
        self._shard, self._offset, self._size = (listing.arrays[key] for key in ("shard", "offset", "size"))
        self._files = _OpenFiles()

    def name(self, index: int) -> str:
        return f"{printable(self._path(index))}#{printable(self.listing.names[index])}"

    def encoded(self, index: int) -> bytes:
        size = int(self._size[index])
        check_size(self.name(index), size)
        try:
            data = self._files.read(self._path(index), int(self._offset[index]), size)
        except OSError as error:
            raise unreadable(self.name(index), error) from error
        if len(data) < size:
            raise BadImage(self.name(index), f"the tar ends after {len(data):,} of its {size:,} bytes")
        return data

    def _path(self, index: int) -> bytes:
        return self._shards[int(self._shard[index])]


class _OpenFile:
    """A file descriptor that closes when the last one who reads from it is done."""

    def __init__(self, path: bytes) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class _OpenFiles:
    """The shards that this process read last, opened when first needed. Safe to fork and to share among threads."""

    def __init__(self) -> None:
        self._forget(os.getpid())

    def _forget(self, process: int) -> None:
        self._process = process
        self._lock = threading.Lock()  # a forked child may inherit a lock that nobody will release
        self._files: OrderedDict[bytes, _OpenFile] = OrderedDict()

    def read(self, path: bytes, offset: int, size: int) -> bytes:
        """Return up to ``size`` bytes at ``offset``, fewer only where the file ends. Raises OSError."""
        file = self._open(path)
        data = os.pread(file.descriptor, size, offset)
        while len(data) < size and (more := os.pread(file.descriptor, size - len(data), offset + len(data))):
            data += more
        return data

    def _open(self, path: bytes) -> _OpenFile:
        process = os.getpid()
        if process != self._process:
            self._forget(process)
        with self._lock:
            file = self._files.pop(path, None) or _OpenFile(path)
            self._files[path] = file
            if len(self._files) > MAX_OPEN_SHARDS:
                self._files.popitem(last=False)
        return file


def open_tar(spec: str, pattern: str, cache_dir: Path | None) -> TarSource:
    """Return the images in one or several tars: a path, a glob or a brace pattern, with ``#FOLDER`` to select a part.

    Labels come from ``NAME.cls`` members beside the images (webdataset), which hold a class number; without those from
    the directory right above each image, when every image has one and at least two differ.

    Raises :class:`UserError` for tars that are missing, compressed, damaged, cut short or without images.
    """
    pattern, folder = _split_folder(pattern)
    if not pattern:
        raise UserError(f"{spec}: no tar is named; write for instance tar:/data/shard-{{000..127}}.tar")
    paths = shard_paths(spec, pattern)
    key = ("tar", folder, *paths)
    listing = cached_listing(key, lambda: _list(spec, paths, folder, _labels_by_directory), cache_dir)
    return TarSource(spec, listing)


def open_tar_per_class(spec: str, root: str, cache_dir: Path | None) -> TarSource:
    """Return the images in all ``*.tar`` of the directory ``root``, labelled by the name of their tar."""
    paths = shard_paths(spec, os.path.join(root, "*.tar"))
    listing = cached_listing(("tar per class", *paths), lambda: _list(spec, paths, "", _labels_by_shard), cache_dir)
    return TarSource(spec, listing)


def _split_folder(pattern: str) -> tuple[str, str]:
    """Split ``PATH#FOLDER``; a file whose own name has the ``#`` is taken whole."""
    if os.path.exists(os.path.expanduser(pattern)):
        return pattern, ""
    path, _, folder = pattern.partition(".tar#")
    return (f"{path}.tar", folder.strip("/")) if folder else (pattern, "")


class _Found:
    """The images of all shards while they are being listed, and what their labels can be drawn from."""

    def __init__(self, spec: str, paths: list[str], folder: str) -> None:
        self.spec = spec
        self.paths = paths
        self._prefix = os.fsencode(f"{folder}/") if folder else b""
        self._blob = bytearray()
        self._ends = array("q")
        self.shard = array("i")
        self.offset = array("q")
        self.size = array("q")
        self.directories: dict[bytes, int] = {}
        self.directory = array("i")
        """For each image, the number of the directory right above it in ``directories`` (empty name: none)."""
        self.cls = array("i")
        """For each image, the number in its ``.cls`` member, -1 without one."""
        self.unsafe = 0

    def names(self) -> Strings:
        return Strings(np.frombuffer(bytes(self._blob), np.uint8), np.array(self._ends, np.int64))

    def __len__(self) -> int:
        return len(self._ends)

    def add_shard(self, number: int, progress: Progress) -> None:
        """Read the headers of one shard and add its images."""
        images: dict[bytes, tuple[int, int]] = {}
        cls: dict[bytes, tuple[int, int]] = {}
        for member in members(self.paths[number], self.spec):
            progress.update(len(self) + len(images), number + 1)
            if not member.name.startswith(self._prefix):
                continue
            if not is_safe(member.name):
                self.unsafe += 1
                continue
            if any(part.startswith(b".") for part in member.name.split(b"/")):
                continue
            # A name that comes twice was updated: as in unpacking, the last one counts.
            if is_image_name(member.name):
                images[member.name] = member.offset, member.size
            elif member.name.endswith(b".cls"):
                cls[_sample(member.name)] = member.offset, member.size
        numbers = self._class_numbers(self.paths[number], cls)
        for name in sorted(images):
            offset, size = images[name]
            self._blob += name
            self._ends.append(len(self._blob))
            self.shard.append(number)
            self.offset.append(offset)
            self.size.append(size)
            directory = name[len(self._prefix) :].rpartition(b"/")[0].rpartition(b"/")[2]
            self.directory.append(self.directories.setdefault(directory, len(self.directories)))
            self.cls.append(numbers.get(_sample(name), -1) if numbers else -1)

    def _class_numbers(self, path: str, cls: dict[bytes, tuple[int, int]]) -> dict[bytes, int]:
        numbers: dict[bytes, int] = {}
        if not cls:
            return numbers
        with open(path, "rb") as file:
            for sample, (offset, size) in cls.items():
                file.seek(offset)
                text = file.read(min(size, _MAX_CLS_BYTES)).strip()
                if not text.isdigit() or int(text) >= MAX_CLASSES:
                    raise UserError(
                        f"{self.spec}: {path}#{printable(sample)}.cls holds {printable(text)!r}\n"
                        f"  expected a class number from 0 to {MAX_CLASSES - 1:,}"
                    )
                numbers[sample] = int(text)
        return numbers


def _sample(name: bytes) -> bytes:
    """Return what the members of one webdataset sample share: all before the first dot of the file name."""
    directory, slash, file = name.rpartition(b"/")
    return directory + slash + file.partition(b".")[0]


_Labels = tuple[list[bytes], np.ndarray] | None


def _labels_by_shard(found: _Found) -> _Labels:
    stems = [os.fsencode(Path(path).stem) for path in found.paths]
    return stems, np.array(found.shard, np.int32)


def _labels_by_directory(found: _Found) -> _Labels:
    cls = np.array(found.cls, np.int32)
    if np.any(cls >= 0):
        missing = np.flatnonzero(cls < 0)
        if len(missing):
            raise UserError(
                f"{found.spec}: {len(missing):,} of {len(cls):,} images have no .cls beside them, "
                f"the first is {printable(found.names()[int(missing[0])])}"
            )
        return [b"%d" % number for number in range(int(cls.max()) + 1)], cls
    names = sorted(found.directories)
    if b"" in names or len(names) < 2:
        return None
    order = np.empty(len(names), np.int32)
    order[[found.directories[name] for name in names]] = np.arange(len(names))
    return names, order[np.array(found.directory, np.int32)]


def _list(spec: str, paths: list[str], folder: str, labels_of: Callable[[_Found], _Labels]) -> Listing:
    started_ns = time.time_ns()
    found = _Found(spec, paths, folder)
    progress = Progress(spec, "tars")
    stamps = []
    for number, path in enumerate(paths):
        try:
            stamps.append(stamp(os.fsencode(path)))
        except OSError as error:
            raise UserError(f"{spec}: cannot read {path} ({error.strerror})") from error
        found.add_shard(number, progress)
    where = paths[0] if len(paths) == 1 else f"{len(paths):,} tars from {paths[0]} on"
    if found.unsafe:
        log.warning("%s: left out %s members whose names lead outside the tar", spec, f"{found.unsafe:,}")
    if not len(found):
        raise no_images(spec, f"'{folder}' of {where}" if folder else where, IMAGE_EXTENSIONS)
    labelled = labels_of(found)
    classes, labels = labelled if labelled is not None else (None, None)
    return Listing.build(
        root="",
        started_ns=started_ns,
        names=found.names(),
        classes=classes,
        labels=labels,
        watched=Strings.pack(os.fsencode(path) for path in paths),
        stamps=np.array(stamps, np.int64).reshape(-1, 2),
        extra={
            "shard": np.array(found.shard, np.int32),
            "offset": np.array(found.offset, np.int64),
            "size": np.array(found.size, np.int64),
        },
    )
