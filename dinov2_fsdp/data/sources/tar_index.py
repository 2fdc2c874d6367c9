"""Where in a tar each member's bytes lie, read once from its headers; nothing is ever extracted."""

from __future__ import annotations

import glob
import itertools
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from dinov2_fsdp.errors import UserError

BLOCK = 512
MAX_SHARDS = 1_000_000
_MAX_NAME_BYTES = 1 << 16

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True)
class Member:
    """A regular file in a tar: its name without a leading ``./``, and where its bytes lie."""

    name: bytes
    offset: int
    size: int


def members(path: str, spec: str) -> Iterator[Member]:
    """Yield the regular files of the tar ``path`` (ustar, GNU and pax headers) in the order they are stored.

    Links, devices and sparse files are left out. Names are as stored: whether one is safe is for the caller to ask.
    Raises :class:`UserError` when the file is compressed, no tar, damaged, or cut short.
    """
    try:
        with open(path, "rb") as file:
            yield from _Headers(file, path, spec)
    except OSError as error:
        raise UserError(f"{spec}: cannot read {path} ({error.strerror})") from error


class _Headers:
    def __init__(self, file: BinaryIO, path: str, spec: str) -> None:
        self._file = file
        self._path = path
        self._spec = spec
        self._size = os.fstat(file.fileno()).st_size
        self._position = 0

    def __iter__(self) -> Iterator[Member]:
        self._refuse_compressed()
        long_name: bytes | None = None
        records: dict[bytes, bytes] = {}
        while (header := self._header()) is not None:
            size = header.size
            if header.type == tarfile.GNUTYPE_LONGNAME:
                long_name = self._content(size).rstrip(b"\0")
                continue
            if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                records = self._pax_records(self._content(size))
                continue
            if header.type in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
                self._skip(size)
                continue
            if b"size" in records:
                size = self._number(records[b"size"])
            if header.type in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
                size = 0
            offset = self._position
            self._skip(0 if header.type == tarfile.DIRTYPE else size)
            sparse = any(key.startswith(b"GNU.sparse") for key in records)
            if header.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE) and not sparse:
                name = records.get(b"path") or long_name or header.name.encode("utf-8", "surrogateescape")
                yield Member(name[2:] if name.startswith(b"./") else name, offset, size)
            long_name, records = None, {}

    def _refuse_compressed(self) -> None:
        magic = self._file.read(6)
        for start, method in _COMPRESSED.items():
            if magic.startswith(start):
                raise UserError(
                    f"{self._spec}: {self._path} is compressed ({method}), so its images cannot be read in any order\n"
                    "  decompress it once (images hardly shrink) and name the plain .tar"
                )

    def _header(self) -> tarfile.TarInfo | None:
        """Return the header at the position, None at the end-of-archive mark."""
        block = self._read(BLOCK)
        if block.count(0) == BLOCK:
            return None
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            where = "is not a tar file" if self._position == BLOCK else f"is damaged at byte {self._position - BLOCK:,}"
            raise self._broken(f"{where} ({error})") from error
        if header.size < 0:
            raise self._broken(f"is damaged at byte {self._position - BLOCK:,} (negative size)")
        if header.type == tarfile.GNUTYPE_SPARSE:
            extended = block[482]
            while extended:
                extended = self._read(BLOCK)[504]
        return header

    def _content(self, size: int) -> bytes:
        if size > _MAX_NAME_BYTES:
            raise self._broken(f"is damaged: a name of {size:,} bytes")
        return self._read(-(-size // BLOCK) * BLOCK)[:size]

    def _pax_records(self, content: bytes) -> dict[bytes, bytes]:
        records: dict[bytes, bytes] = {}
        while content.strip(b"\0"):
            digits, _, _ = content.partition(b" ")
            length = self._number(digits)
            key, equals, value = content[len(digits) + 1 : length].partition(b"=")
            if not equals or not value.endswith(b"\n"):
                raise self._broken("is damaged: an extended header cannot be read")
            records[key] = value[:-1]
            content = content[length:]
        return records

    def _number(self, digits: bytes) -> int:
        if not digits.isdigit():
            raise self._broken("is damaged: an extended header cannot be read")
        return int(digits)

    def _read(self, count: int) -> bytes:
        self._file.seek(self._position)
        data = self._file.read(count)
        if len(data) < count:
            if self._size == 0:
                raise self._broken("is empty")
            if self._size < BLOCK:
                raise self._broken("is not a tar file")
            raise self._cut_short()
        self._position += count
        return data

    def _skip(self, size: int) -> None:
        if size > self._size:  # a header may claim more than a file can be sought to
            raise self._cut_short()
        self._position += -(-size // BLOCK) * BLOCK

    def _cut_short(self) -> UserError:
        return self._broken(f"is cut short: it ends after {self._size:,} bytes, before its end mark")

    def _broken(self, problem: str) -> UserError:
        return UserError(f"{self._spec}: {self._path} {problem}\n  copy or make it again")


def is_safe(name: bytes) -> bool:
    """Return whether a member's name stays below where it would be unpacked."""
    return not name.startswith(b"/") and b".." not in name.split(b"/")


def shard_paths(spec: str, pattern: str) -> list[str]:
    """Return the absolute paths, sorted, that a path, a glob (``*``, ``?``) or a brace pattern stands for.

    ``{000..127}`` counts with the first number's width; ``{a,b}`` chooses. A file of exactly this name comes first.
    Raises :class:`UserError` when one of them does not exist or a glob matches nothing.
    """
    pattern = os.path.abspath(os.path.expanduser(pattern))
    if os.path.exists(pattern):
        return [_file(spec, pattern)]
    paths: set[str] = set()
    for path in _expand_braces(spec, pattern):
        if "*" in path or "?" in path:
            matches = glob.glob(path.replace("[", "[[]"))
            if not matches:
                raise UserError(f"{spec}: no file matches '{path}'")
            paths.update(_file(spec, match) for match in matches)
        elif os.path.exists(path):
            paths.add(_file(spec, path))
        else:
            raise UserError(f"{spec}: '{path}' does not exist")
    return sorted(paths, key=os.fsencode)


def _file(spec: str, path: str) -> str:
    if os.path.isdir(path):
        raise UserError(
            f"{spec}: {path} is a directory\n"
            f"  for the tars in it write 'tar:{os.path.join(path, '*.tar')}', for image files folder:{path}"
        )
    return path


def _expand_braces(spec: str, pattern: str) -> Iterator[str]:
    parts = _BRACES.split(pattern)
    choices = [_choices(spec, inner) for inner in parts[1::2]]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > MAX_SHARDS:
        raise UserError(f"{spec}: the braces stand for {count:,} files, more than {MAX_SHARDS:,}")
    for chosen in itertools.product(*choices):
        yield "".join(itertools.chain(*itertools.zip_longest(parts[0::2], chosen, fillvalue="")))


def _choices(spec: str, inner: str) -> list[str]:
    bounds = _RANGE.fullmatch(inner)
    if bounds is None:
        return inner.split(",")
    first, last = bounds.groups()
    if int(last) < int(first) or int(last) - int(first) >= MAX_SHARDS:
        raise UserError(f"{spec}: the range {{{inner}}} must count up, over at most {MAX_SHARDS:,} files")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
