"""A tree of image files, unlabelled or with one folder per class."""

from __future__ import annotations

import os
import time
from array import array
from itertools import accumulate, groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dinov2_fsdp.data.sources.base import check_size, unreadable
from dinov2_fsdp.data.sources.decoding import IMAGE_EXTENSIONS, is_image_name
from dinov2_fsdp.data.sources.listed import ListedSource
from dinov2_fsdp.data.sources.listing import Listing, Progress, Strings, cached_listing, no_images, printable, stamp
from dinov2_fsdp.errors import UserError


class FolderSource(ListedSource):
    """Image files below a directory, in the order of their relative paths' bytes."""

    def __init__(self, spec: str, listing: Listing) -> None:
        super().__init__(spec, listing)
        self._root = os.fsencode(listing.root)

    def name(self, index: int) -> str:
        return printable(self._path(index))

    def encoded(self, index: int) -> bytes:
        path = self._path(index)
        try:
            with open(path, "rb") as file:
                check_size(printable(path), os.fstat(file.fileno()).st_size)
                return file.read()
        except OSError as error:
            raise unreadable(printable(path), error) from error

    def _path(self, index: int) -> bytes:
        return os.path.join(self._root, self.listing.names[index])


def open_folder(spec: str, path: str, cache_dir: Path | None, *, fewest_classes: int = 2) -> FolderSource:
    """Return the images below ``path``.

    They are labelled by the first component of their relative path when every image has one and at least
    ``fewest_classes`` of them differ. Raises :class:`UserError` for a path that is missing, is no directory, cannot be
    read or holds no image.
    """
    root = os.path.abspath(os.path.expanduser(path))
    if not path or not os.path.isdir(root):
        problem = "is not a directory" if path and os.path.exists(root) else "does not exist"
        hint = f"\n  a tar file is written tar:{path}" if path.endswith(".tar") else ""
        raise UserError(f"{spec}: the directory '{path}' {problem}{hint}")
    key = ("folder", root, str(fewest_classes))
    return FolderSource(spec, cached_listing(key, lambda: _list(spec, root, fewest_classes), cache_dir))


def _list(spec: str, root: str, fewest_classes: int) -> Listing:
    started_ns = time.time_ns()
    walk = _Walk(spec, os.fsencode(root))
    walk.visit(b"")
    names = walk.names()
    if not len(names):
        raise no_images(spec, root, IMAGE_EXTENSIONS)
    classes = sorted({top for top, _ in walk.tops})
    labelled = b"" not in classes and len(classes) >= fewest_classes
    return Listing.build(
        root=root,
        started_ns=started_ns,
        names=names,
        classes=classes if labelled else None,
        labels=_labels(walk.tops, classes) if labelled else None,
        watched=Strings.pack(walk.directories),
        stamps=np.array(walk.stamps, np.int64).reshape(-1, 2),
    )


def _labels(runs: list[tuple[bytes, int]], classes: list[bytes]) -> npt.NDArray[np.int32]:
    number = {name: label for label, name in enumerate(classes)}
    labels = np.array([number[top] for top, _ in runs], np.int32)
    return np.repeat(labels, np.array([count for _, count in runs], np.int64))


class _Walk:
    """One pass over a tree, in the byte order of relative paths.

    A linked directory is entered once, and not at all when it leads into the tree itself or above it: those images are
    listed where they really are. Hidden files and directories are left out.
    """

    def __init__(self, spec: str, root: bytes) -> None:
        self._spec = spec
        self._root = root
        self._real_root = os.path.realpath(root)
        self._behind_links: set[tuple[int, int]] = set()
        self._progress = Progress(printable(root), "directories")
        self._blob = bytearray()
        self._ends = array("q")
        self.tops: list[tuple[bytes, int]] = []
        """Runs of (first path component, number of images), in order; the component is empty for images in the root."""
        self.directories: list[bytes] = []
        self.stamps: list[tuple[int, int]] = []

    def names(self) -> Strings:
        """Return the relative paths found so far."""
        return Strings(np.frombuffer(bytes(self._blob), np.uint8), np.array(self._ends, np.int64))

    def visit(self, prefix: bytes, behind_link: bool = False) -> None:
        """Add the images below the directory ``prefix``: relative, with its slash, empty for the root."""
        directory = os.path.join(self._root, prefix)
        try:
            if behind_link and not self._is_new(directory):
                return
            # Before the look inside: what changes meanwhile then shows as a change.
            self.stamps.append(stamp(directory))
            self.directories.append(directory)
            files, folders, links = self._scan(directory)
        except OSError as error:
            raise UserError(
                f"{self._spec}: cannot list {printable(directory)} ({error.strerror})\n"
                "  make it readable, or name a directory that does not contain it"
            ) from error
        linked = frozenset(links)
        # Folders carry their slash into the comparison, so that sorting each directory sorts whole paths.
        for is_folder, run in groupby(sorted(files + folders + links), key=lambda name: name.endswith(b"/")):
            if not is_folder:
                self._add(prefix, list(run))
                continue
            for name in run:
                self.visit(prefix + name, behind_link or name in linked)
        self._progress.update(len(self._ends), len(self.directories))

    def _scan(self, directory: bytes) -> tuple[list[bytes], list[bytes], list[bytes]]:
        """Return the names of image files, of folders and of linked folders, the latter two with a slash."""
        files: list[bytes] = []
        folders: list[bytes] = []
        links: list[bytes] = []
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name + b"/")
                elif is_image_name(entry.name):
                    # A link to an image is not followed here: that would cost a look at every image.
                    if entry.is_file(follow_symlinks=False) or entry.is_symlink():
                        files.append(entry.name)
                elif entry.is_symlink() and entry.is_dir() and self._leads_outside(entry.path):
                    links.append(entry.name + b"/")
        return files, folders, links

    def _leads_outside(self, link: bytes) -> bool:
        target = os.path.realpath(link)
        return os.path.commonpath([target, self._real_root]) not in (target, self._real_root)

    def _is_new(self, directory: bytes) -> bool:
        status = os.stat(directory)
        identity = (status.st_dev, status.st_ino)
        if identity in self._behind_links:
            return False
        self._behind_links.add(identity)
        return True

    def _add(self, prefix: bytes, names: list[bytes]) -> None:
        start = len(self._blob)
        paths = [prefix + name for name in names]
        self._blob += b"".join(paths)
        self._ends.extend(end + start for end in accumulate(map(len, paths)))
        top, slash, _ = prefix.partition(b"/")
        self.tops.append((top if slash else b"", len(names)))
