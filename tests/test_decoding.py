from __future__ import annotations

import io
import pickle
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov2_fsdp.data.sources import BadImage, decode
from dinov2_fsdp.data.sources.decoding import LazyImage


def photograph(mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode)


def saved(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [
        *[(mode, "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")],
        *[(mode, "JPEG") for mode in ("L", "RGB", "CMYK", "YCbCr")],
        *[(mode, "TIFF") for mode in ("L", "RGB", "CMYK", "I;16")],
        ("RGB", "WEBP"),
        ("RGBA", "WEBP"),
        ("P", "GIF"),
        ("RGB", "BMP"),
        ("RGB", "PPM"),
    ],
)
def test_every_mode_becomes_rgb_of_the_same_size(mode: str, file_format: str) -> None:
    image = Image.new("I;16", (64, 48)) if mode == "I;16" else photograph(mode)
    decoded = decode(saved(image, file_format), "x")
    assert (decoded.mode, decoded.size) == ("RGB", (64, 48))


def test_16_bit_grey_keeps_its_range() -> None:
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    for file_format in ("PNG", "TIFF", "PPM"):
        decoded = np.asarray(decode(saved(Image.fromarray(ramp), file_format), "x"))
        np.testing.assert_array_equal(decoded, np.arange(256).reshape(16, 16, 1).repeat(3, 2))


def test_cmyk_keeps_its_colours() -> None:
    red = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    pixel = decode(red, "x").getpixel((8, 8))
    assert np.abs(np.array(pixel) - (255, 0, 0)).max() < 8


def test_palettes_with_transparency_keep_their_colours() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    decoded = decode(saved(image, "PNG", transparency=b"\x80\x00"), "x")
    assert [decoded.getpixel((0, 0)), decoded.getpixel((1, 0))] == [(10, 20, 30), (40, 50, 60)]


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_undone(orientation: int, file_format: str) -> None:
    upright = np.zeros((2, 3), np.uint8)
    upright[0, 0], upright[0, 2] = 200, 100
    # How a camera stores an upright picture under each orientation, written from the EXIF standard (tag 0x0112).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: upright.T[::-1],
        7: upright.T[::-1, ::-1],
        8: upright.T[:, ::-1],
    }[orientation]
    image = Image.fromarray(np.ascontiguousarray(stored.repeat(16, 0).repeat(16, 1))).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if file_format == "WEBP" else {}
    decoded = np.asarray(decode(saved(image, file_format, exif=exif, **options), "x"))[8::16, 8::16, 0]
    np.testing.assert_allclose(decoded, upright, atol=6)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_spoil_sound_pixels() -> None:
    data = saved(photograph(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff broken")
    assert decode(data, "x").size == (64, 48)


def test_jpeg_pixels_are_exact() -> None:
    data = saved(photograph(size=(640, 480)), "JPEG")
    np.testing.assert_array_equal(np.asarray(decode(data, "x")), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
def test_a_truncated_image_is_bad_and_named(file_format: str) -> None:
    data = saved(photograph(), file_format)
    for part in (0.5, 0.9):
        with pytest.raises(BadImage) as caught:
            decode(data[: int(len(data) * part)], "folder/x.jpg")
        assert caught.value.name == "folder/x.jpg"
        assert caught.value.reason


def test_a_flipped_bit_in_png_pixels_is_bad() -> None:
    data = bytearray(saved(photograph(), "PNG"))
    data[len(data) // 2] ^= 1
    with pytest.raises(BadImage):
        decode(bytes(data), "x")


def test_a_format_that_no_extension_promises_is_not_decoded() -> None:
    with pytest.raises(BadImage, match="not an image of a known format"):
        decode(saved(photograph(), "EPS"), "x.jpg")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_bad_before_its_pixels_are_allocated() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    for width, height in ((10_001, 10_000), (60_000, 60_000)):
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        pixels = zlib.compress(b"\0" * 1000)
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
        with pytest.raises(BadImage, match=r"pixels|decompression bomb"):
            decode(bomb, "x")


def test_values_without_a_known_range_are_bad() -> None:
    for image in (Image.new("F", (4, 4), 0.5), Image.new("I", (4, 4), 1 << 20), Image.new("I", (4, 4), -1)):
        with pytest.raises(BadImage, match="no known range"):
            decode(saved(image, "TIFF"), "x")


def test_a_bad_image_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(BadImage("a.jpg", "because")))
    assert (error.name, error.reason, str(error)) == ("a.jpg", "because", "a.jpg: because")


# -- size first, pixels later -----------------------------------------------------------------------------------------


def oriented(orientation: int, file_format: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(photograph(size=(6, 4)).resize((67, 45)), file_format, exif=exif)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_said_first_is_that_of_the_upright_image(orientation: int, file_format: str) -> None:
    data = oriented(orientation, file_format)
    image = LazyImage(data, "x")
    assert (image.width, image.height) == decode(data, "x").size == ((45, 67) if orientation > 4 else (67, 45))


def test_a_jpeg_file_is_not_decoded_for_its_size() -> None:
    whole = saved(photograph(size=(640, 480)), "JPEG")
    assert LazyImage(whole[: len(whole) // 2], "x").width == 640


@pytest.mark.parametrize(
    "data",
    [
        *[saved(photograph(mode, (67, 45)), "JPEG") for mode in ("L", "RGB", "CMYK", "YCbCr")],
        saved(photograph(size=(67, 45)), "JPEG", progressive=True),
        saved(photograph(size=(67, 45)), "JPEG", subsampling=2),
        saved(photograph(size=(67, 45)), "PNG"),
        *[oriented(orientation) for orientation in (1, 3, 6)],
    ],
    ids=["grey", "RGB", "CMYK", "YCbCr", "progressive", "4:2:0", "PNG", "upright", "overhead", "on its side"],
)
def test_pixels_are_those_of_the_exact_image(data: bytes) -> None:
    np.testing.assert_array_equal(LazyImage(data, "x").pixels(), np.asarray(decode(data, "x")))


@pytest.mark.parametrize("reduction", [2, 4, 8])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_file_is_decoded_at_a_reduced_size_as_by_pillow(mode: str, reduction: int) -> None:
    data = saved(photograph(mode, (67, 45)), "JPEG")
    drafted = Image.open(io.BytesIO(data))
    drafted.draft(None, (67 // reduction, 45 // reduction))
    pixels = LazyImage(data, "x").pixels(reduction)
    assert pixels.shape == (-(-45 // reduction), -(-67 // reduction), 3)
    np.testing.assert_array_equal(pixels, np.asarray(drafted.convert("RGB")))


def test_a_reduced_image_is_upright() -> None:
    for orientation in range(1, 9):
        data = oriented(orientation)
        small, whole = LazyImage(data, "x").pixels(4), decode(data, "x")
        resized = np.asarray(whole.resize(small.shape[1::-1], Image.Resampling.BOX))
        assert np.corrcoef(small.ravel(), resized.ravel())[0, 1] > 0.9


def test_other_files_are_not_reduced() -> None:
    image = LazyImage(saved(photograph(), "PNG"), "x")
    assert not image.reducible
    assert image.pixels(4).shape == (48, 64, 3)


def test_an_image_that_is_there_already_is_taken_as_it_is() -> None:
    image = LazyImage.of(photograph())
    assert (image.width, image.height, image.reducible) == (64, 48, False)
    np.testing.assert_array_equal(image.pixels(2), np.asarray(photograph()))
