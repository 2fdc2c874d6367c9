"""Small image folders and tars for the tests of the sources."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image

from dinov2_fsdp.data.sources import Source

Open = Callable[[str], Source]


def encode(value: int = 0) -> bytes:
    """A small plain image whose first channel is ``value``."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (value, 1, 2)).save(buffer, "PNG")
    return buffer.getvalue()


def grow(root: Path, *names: str) -> Path:
    """Images below ``root``, the n-th of them with the value n; all directories look long unchanged."""
    for value, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(value))
    age(root)
    return root


def age(root: Path) -> None:
    for directory, _, files in os.walk(root):
        for path in (directory, *(os.path.join(directory, file) for file in files)):
            os.utime(path, ns=(10**18 + 1, 10**18 + 1), follow_symlinks=False)


def pack(path: Path, members: Iterable[tuple[str, bytes]], tar_format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def pack_images(path: Path, *names: str) -> Path:
    return pack(path, [(name, encode(value)) for value, name in enumerate(names)])


def names(source: Source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def values(source: Source) -> list[int]:
    return [source.image(index).getpixel((0, 0))[0] for index in range(len(source))]  # type: ignore[index]
