"""From the bytes of an image file to RGB pixels, or to a named reason why not."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MAX_PIXELS = 100_000_000
IMAGE_EXTENSIONS = (b".jpg", b".jpeg", b".png", b".webp", b".bmp", b".tif", b".tiff", b".gif", b".ppm")

# Only what the extensions promise: other plug-ins (EPS starts an interpreter) must not see a stranger's bytes.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = (5, 6, 7, 8)


class BadImage(Exception):
    """One image that cannot be read: ``name`` says which, ``reason`` says why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def is_image_name(name: bytes) -> bool:
    """Return whether a file or member of this name (bytes, any case) is taken for an image."""
    return name.lower().endswith(IMAGE_EXTENSIONS)


def decode(data: bytes, name: str) -> Image.Image:
    """Return the image in ``data`` as RGB at its full, exact resolution, upright by its EXIF orientation.

    Of an animation the first frame is taken. Alpha is dropped, as the released DINOv2 code does; 16-bit values keep
    their high byte. Raises :class:`BadImage` for anything undecodable or truncated, and for more than 100 megapixels.
    """
    return LazyImage(data, name).rgb()


class LazyImage:
    """An image that says its size before it is decoded, so that a JPEG file can be decoded no larger than needed.

    Attributes:
        width, height: pixels of the full image, upright.
        reducible: whether it can be decoded at a reduced size: a JPEG file.

    Raises:
        BadImage: now or when the pixels are asked for, as :func:`decode` does.
    """

    def __init__(self, data: bytes, name: str) -> None:
        self._data, self._name = data, name
        self._rgb: Image.Image | None = None
        with _naming(name):
            self._image = _open(data, name)
        self.reducible = self._image.format == "JPEG"
        # Other formats gain nothing by waiting, and some tell their orientation only when decoded.
        orientation = _orientation(self._image) if self.reducible else None
        self._is_plain = self.reducible and self._image.mode == "RGB" and orientation is None
        self.width, self.height = self._image.size if self.reducible else self.rgb().size
        if orientation in _ON_ITS_SIDE:
            self.width, self.height = self.height, self.width

    @classmethod
    def of(cls, image: Image.Image) -> LazyImage:
        """Return an RGB image that is there already."""
        lazy = cls.__new__(cls)
        lazy._rgb, lazy.reducible, lazy._is_plain = image, False, False
        lazy.width, lazy.height = image.size
        return lazy

    @property
    def nbytes(self) -> int:
        """About how much memory it holds now."""
        return len(self._data) if self._rgb is None else 3 * self.width * self.height

    def rgb(self) -> Image.Image:
        """Return the image as RGB at its full, exact resolution."""
        if self._rgb is None:
            with _naming(self._name):
                self._image.load()
                self._rgb = _to_rgb(_upright(self._image), self._name)
        return self._rgb

    def pixels(self, reduction: int = 1) -> NDArray[np.uint8]:
        """Return the pixels of :meth:`rgb`, (height, width, 3) uint8; of a JPEG file with both sides divided by
        ``reduction`` (1, 2, 4 or 8) and rounded up, which takes a fraction of the time."""
        if self._is_plain and (pixels := _decoded_by_opencv(self._data, reduction)) is not None:
            return pixels
        if reduction == 1 or not self.reducible:
            return np.array(self.rgb())
        with _naming(self._name):
            image = _open(self._data, self._name)
            image.draft(None, (image.width // reduction, image.height // reduction))
            image.load()
            return np.array(_to_rgb(_upright(image), self._name))


def _open(data: bytes, name: str) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(name, f"{image.width}×{image.height} pixels are more than {MAX_PIXELS:,}")
    return image


def _decoded_by_opencv(data: bytes, reduction: int) -> NDArray[np.uint8] | None:
    """Return a JPEG file's pixels as Pillow would decode them, None where Pillow has to say what is wrong.

    Both use libjpeg-turbo; OpenCV spares two copies, a quarter of the time. Unlike Pillow it takes a file that is
    damaged behind its last row.
    """
    import cv2  # here, because whoever only looks at file names should not wait for it

    try:
        if reduction == 1:
            flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
            return cv2.imdecode(np.frombuffer(data, np.uint8), flags)  # type: ignore[return-value]
        flags = getattr(cv2, f"IMREAD_REDUCED_COLOR_{reduction}") | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        return None if pixels is None else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)  # type: ignore[return-value]
    except cv2.error:
        return None


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Turn whatever a decoder raises into :class:`BadImage`."""
    try:
        yield
    except (BadImage, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise BadImage(name, f"not an image of a known format ({', '.join(_FORMATS)})") from None
    except Exception as error:  # decoders meet hostile bytes with any exception: struct.error, KeyError, SyntaxError …
        raise BadImage(name, f"{type(error).__name__}: {error}") from error


def _orientation(image: Image.Image) -> int | None:
    """Return a key of ``_UPRIGHT``, None for an image that stands upright or does not say."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # broken metadata around sound pixels: the image is usable as it is stored
        return None
    return orientation if isinstance(orientation, int) and orientation in _UPRIGHT else None


def _upright(image: Image.Image) -> Image.Image:
    orientation = _orientation(image)
    return image if orientation is None else image.transpose(_UPRIGHT[orientation])


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        # Pillow's own conversion clips at 255 instead of scaling, which turns such images white.
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise BadImage(name, "32-bit integer values have no known range")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadImage(name, "floating-point values have no known range")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")
