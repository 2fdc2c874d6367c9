"""What every source of images offers, whatever the images are stored in."""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinov2_fsdp.data.sources.decoding import BadImage, LazyImage

UNLABELLED = -1
MAX_FILE_BYTES = 1 << 30

# These say that the process or machine is in trouble, not that one image is bad.
_NOT_THE_IMAGES_FAULT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class Source(ABC):
    """A fixed, ordered set of images with random access.

    Sources are safe to fork and to pickle (a pickle holds paths, never the listing), and keep no state that
    depends on which images were read before.
    """

    spec: str
    """The text that :func:`dinov2_fsdp.data.sources.open_source` chose this source by."""

    @property
    @abstractmethod
    def classes(self) -> list[str] | None:
        """Class names in the order of the labels; None when the source is unlabelled."""

    @property
    @abstractmethod
    def labels(self) -> npt.NDArray[np.int64] | None:
        """All labels, shape (len,), int64; None when the source is unlabelled."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of which images are listed, in which order and with which labels (not of their pixels).

        Equal on all ranks, and across machines that hold the same set under different paths.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def encoded(self, index: int) -> bytes | None:
        """Return the image's file as bytes, None where there is no file. Raises :class:`BadImage`."""

    @abstractmethod
    def label(self, index: int) -> int:
        """Return the class number of an image, -1 when the source is unlabelled."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return what a message should call this image: a file, a tar member, or ``scenes:17``."""

    def image(self, index: int) -> Image.Image:
        """Return the image as RGB, upright by its EXIF orientation. Raises :class:`BadImage`."""
        data = self.encoded(index)
        if data is None:
            raise TypeError(f"{type(self).__name__} has no files and must render its images itself")
        return LazyImage(data, self.name(index)).rgb()

    def lazy_image(self, index: int) -> LazyImage:
        """Return the image with its size read and, where that can wait, its pixels not. Raises :class:`BadImage`."""
        data = self.encoded(index)
        return LazyImage.of(self.image(index)) if data is None else LazyImage(data, self.name(index))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec!r}, {len(self):,} images)"


def unreadable(name: str, error: OSError) -> Exception:
    """Return what to raise when reading an image's file failed: :class:`BadImage`, or the error itself
    when the machine is to blame rather than the file."""
    if error.errno in _NOT_THE_IMAGES_FAULT:
        return error
    return BadImage(name, error.strerror or str(error))


def check_size(name: str, size: int) -> None:
    """Raise :class:`BadImage` for a file that is empty or too large to be one image."""
    if size == 0:
        raise BadImage(name, "the file is empty")
    if size > MAX_FILE_BYTES:
        raise BadImage(name, f"the file has {size:,} bytes, more than {MAX_FILE_BYTES:,}")
