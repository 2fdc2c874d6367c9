"""From the bytes of an image file to RGB pixels, or to a named reason why not."""

from __future__ import annotations

import io

import numpy as np
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
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise BadImage(name, f"{image.width}×{image.height} pixels are more than {MAX_PIXELS:,}")
        image.load()
        return _to_rgb(_upright(image), name)
    except (BadImage, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise BadImage(name, f"not an image of a known format ({', '.join(_FORMATS)})") from None
    except Exception as error:  # decoders meet hostile bytes with any exception: struct.error, KeyError, SyntaxError …
        raise BadImage(name, f"{type(error).__name__}: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # broken metadata around sound pixels: the image is usable as it is stored
        return image
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


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
