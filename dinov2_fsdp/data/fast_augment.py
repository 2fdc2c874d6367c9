"""The augmentation of :mod:`augment`, several times as fast: the same draws, pixels that differ by rounding.

What makes it fast: a JPEG file is decoded at a reduced size when every crop is shrunk by more than that anyway; where
a processor has AVX-512, compiled code (:mod:`dinov2_fsdp.native`) makes all crops of an image in one call. It resamples
into the crop's planes, with Pillow's bits (``resample.cpp``), and recolours them there, equal to Pillow but for hue
(``colours.cpp``). Elsewhere the resampling is torch's (the same filter with fewer bits) and colours and blur are
OpenCV's. The blur has the kernel that Pillow's three box filters amount to.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from cv2.typing import MatLike
from numpy.typing import NDArray

from dinov2_fsdp.data.augment import CropParameters, MultiCrop
from dinov2_fsdp.data.sources.decoding import LazyImage
from dinov2_fsdp.native import Library, library

# Workers are the parallelism; OpenCV's own threads would fight with them and do not survive a fork.
cv2.setNumThreads(0)

REDUCTIONS = (8, 4, 2)
"""By how much a JPEG decoder can shrink at next to no cost."""

SHARPNESS_MARGIN = 3.0
"""A reduced image keeps at least this many pixels for one of the crop, along each side; see docs/performance.md."""

BOX_FILTERS = 3
"""As many does Pillow run one after another for a Gaussian."""

SIGMA_STEPS = 256
"""Standard deviations of a blur are rounded to this fraction of a pixel, so that their kernels can be kept."""

NEGLIGIBLE = 1 / 2048
"""Outer weights of a blur below this are left out; each would move a value by an eighth of a level at most."""

_NUMBERS = {"brightness": 0, "contrast": 1, "saturation": 2, "hue": 3}
"""Of the operations, in compiled code."""

_MOST_OPERATIONS = 4

# As pixels.h has a crop: the box and the size, where planes and kernel are, its radius, flags and operations.
_CROP = struct.Struct(f"5q2Pq4i{_MOST_OPERATIONS}i{_MOST_OPERATIONS}f")

_LUMA = (0.299, 0.587, 0.114)

# Pillow's blend cuts fractions off, OpenCV rounds. Not quite a half, so that whole numbers stay what they are.
_TRUNCATE = -0.499


class FastMultiCrop(MultiCrop):
    """The same crops as :class:`MultiCrop` draws, up to rounding."""

    def fill(
        self,
        image: LazyImage,
        parameters: Sequence[CropParameters],
        global_crops: NDArray[np.uint8],
        local_crops: NDArray[np.uint8],
    ) -> None:
        sizes = [crops.shape[-1] for crops in (global_crops, local_crops) for _ in crops]
        factor = reduction(parameters, sizes) if image.reducible else 1
        pixels = image.pixels(factor)
        if factor > 1:
            parameters = [replace(drawn, box=reduced_box(drawn.box, factor, pixels)) for drawn in parameters]
        make(pixels, parameters, global_crops, local_crops)


class UncolouredMultiCrop(FastMultiCrop):
    """Crops cut out, resampled and flipped; their colours are left to :mod:`device_colours`."""

    def fill(
        self,
        image: LazyImage,
        parameters: Sequence[CropParameters],
        global_crops: NDArray[np.uint8],
        local_crops: NDArray[np.uint8],
    ) -> None:
        super().fill(image, [uncoloured(drawn) for drawn in parameters], global_crops, local_crops)


def uncoloured(drawn: CropParameters) -> CropParameters:
    """Return the parameters with box and flip alone."""
    return replace(drawn, jitter=(), gray=False, blur_sigma=None, solarize_threshold=None)


def reduction(parameters: Sequence[CropParameters], sizes: Sequence[int]) -> int:
    """Return by how much (1, 2, 4 or 8) an image may be shrunk in decoding without a loss of sharpness in any crop.

    Args:
        parameters: what was drawn for each crop, boxes in pixels of the full image.
        sizes: the side of each crop, pixels.
    """
    shrinks = min(min(drawn.box[2:]) / size for drawn, size in zip(parameters, sizes, strict=True))
    return next((factor for factor in REDUCTIONS if shrinks >= factor * SHARPNESS_MARGIN), 1)


def reduced_box(box: tuple[int, int, int, int], factor: int, pixels: NDArray[np.uint8]) -> tuple[int, int, int, int]:
    """Return where a box of the full image lies in ``pixels``, the image decoded at 1/``factor`` of its size."""
    if factor == 1:
        return box
    top, left, height, width = box
    new_top, new_left = round(top / factor), round(left / factor)
    bottom, right = round((top + height) / factor), round((left + width) / factor)
    return new_top, new_left, min(bottom, pixels.shape[0]) - new_top, min(right, pixels.shape[1]) - new_left


def apply(pixels: NDArray[np.uint8], parameters: CropParameters, size: int) -> MatLike:
    """Return the crop that ``parameters`` describe, (size, size, 3) uint8: as ``augment.apply``, up to rounding.

    Args:
        pixels: (height, width, 3) uint8.
    """
    planes = np.empty((1, 3, size, size), np.uint8)
    make(pixels, [parameters], planes)
    return planes[0].transpose(1, 2, 0)


def make(pixels: NDArray[np.uint8], parameters: Sequence[CropParameters], *outputs: NDArray[np.uint8]) -> None:
    """Write an image's crops.

    Args:
        pixels: (height, width, 3) uint8.
        parameters: what was drawn for each crop, boxes in these pixels.
        outputs: uint8 (crops, 3, size, size), as many crops altogether, those of one size in each.
    """
    compiled, arrays = library(), [pixels[None], *outputs]
    # Compiled code knows of whole rows of three bytes a pixel, and of crops that lie together.
    if (
        compiled is not None
        and "crops" in compiled.names
        and pixels.shape[2:] == (3,)
        and all(array.dtype == np.uint8 and array[:1].flags.c_contiguous for array in arrays)
        and all(crops.flags.writeable for crops in outputs)
    ):
        _make_by_compiled_code(compiled, pixels, parameters, outputs)
        return
    planes = [crop for crops in outputs for crop in crops]
    # One stage after the other over all crops: each leaves the processor's caches to its own code.
    resized = [_resize(pixels, drawn, crop.shape[-1]) for crop, drawn in zip(planes, parameters, strict=True)]
    for crop, picture, drawn in zip(planes, resized, parameters, strict=True):
        recoloured = _recolour(picture, drawn)
        if recoloured.ndim == 2:
            crop[...] = recoloured
        elif crop.flags.c_contiguous:
            cv2.split(recoloured, [*crop])
        else:
            crop[...] = recoloured.transpose(2, 0, 1)


def _make_by_compiled_code(
    compiled: Library, pixels: NDArray[np.uint8], parameters: Sequence[CropParameters], outputs: Sequence[NDArray[Any]]
) -> None:
    places = [(at, crops.shape[-1]) for crops in outputs for at in _addresses(crops)]
    packed, kernels = [], []
    for (at, size), drawn in zip(places, parameters, strict=True):
        kinds, factors = [0] * _MOST_OPERATIONS, [0.0] * _MOST_OPERATIONS
        for place, (name, by) in enumerate(drawn.jitter):
            kinds[place], factors[place] = _NUMBERS[name], _shift(by) if name == "hue" else by
        address, radius = 0, -1
        if drawn.blur_sigma is not None:
            kernel, address, radius = _kernel_in_memory(_rounded(drawn.blur_sigma))
            kernels.append(kernel)  # alive until the call has ended
        threshold = 256 if drawn.solarize_threshold is None else drawn.solarize_threshold
        flags = (drawn.flip, drawn.gray, threshold, len(drawn.jitter))
        packed.append(_CROP.pack(*drawn.box, size, at, address, radius, *flags, *kinds, *factors))
    compiled.crops(pixels.ctypes.data, pixels.strides[0], len(packed), b"".join(packed))


def _addresses(array: NDArray[Any]) -> list[int]:
    """Return where each of an array's items begins in memory."""
    first, step = array.ctypes.data, array.strides[0]
    return [first + step * i for i in range(len(array))]


def _resize(pixels: NDArray[np.uint8], parameters: CropParameters, size: int) -> MatLike:
    """Return what lies in the box, resampled by torch and flipped if drawn so, (size, size, 3); a copy in any case."""
    top, left, height, width = parameters.box
    crop = pixels[top : top + height, left : left + width]
    if (height, width) == (size, size):
        resized = crop.copy()
    else:
        # The batch dimension first: torch then knows the image as channels-last, and gives such a one back.
        image = torch.from_numpy(crop)[None].permute(0, 3, 1, 2)
        resized = F.interpolate(image, (size, size), mode="bicubic", antialias=True).numpy()[0].transpose(1, 2, 0)
    return cv2.flip(resized, 1) if parameters.flip else resized


def _recolour(crop: MatLike, parameters: CropParameters) -> MatLike:
    """Return the crop by OpenCV; (size, size) if it is grey.

    The crop's own memory may be written to as well: fresh memory would take a third of the time again.
    """
    for operation, factor in parameters.jitter:
        crop = _adjust(crop, operation, factor)
    if parameters.gray:
        crop = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)
    if parameters.blur_sigma is not None:
        kernel = _blur_kernel(_rounded(parameters.blur_sigma))
        crop = cv2.sepFilter2D(crop, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)
    if parameters.solarize_threshold is not None:
        values = np.arange(256, dtype=np.uint8)
        crop = cv2.LUT(crop, np.where(values < parameters.solarize_threshold, values, 255 - values))
    return crop


def _adjust(crop: MatLike, operation: str, factor: float) -> MatLike:
    if operation == "hue":
        return _shift_hue(crop, _shift(factor))
    if operation == "saturation":
        gray = cv2.cvtColor(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        return cv2.addWeighted(crop, factor, gray, 1 - factor, _TRUNCATE, dst=crop)
    offset = _TRUNCATE
    if operation == "contrast":
        mean = int(sum(weight * value for weight, value in zip(_LUMA, cv2.mean(crop), strict=False)) + 0.5)
        offset += (1 - factor) * mean
    if offset < -0.5:  # where convertScaleAbs would turn what is below zero round
        return cv2.addWeighted(crop, factor, crop, 0, offset, dst=crop)
    return cv2.convertScaleAbs(crop, dst=crop, alpha=factor, beta=offset)


def _shift(factor: float) -> int:
    """Return what is added to a hue of 8 bits."""
    return int(factor * 255) % 256


def _shift_hue(crop: MatLike, shift: int) -> MatLike:
    height, width, _ = crop.shape
    hsv = cv2.cvtColor(crop, cv2.COLOR_RGB2HSV_FULL)
    rows = hsv.reshape(height, 3 * width)
    np.add(rows, _row_of_shifts(width, shift), out=rows)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL, dst=crop)


@functools.lru_cache(maxsize=1024)
def _row_of_shifts(width: int, shift: int) -> NDArray[np.uint8]:
    """Return what is added to a whole row, zeros included, because numpy is slow where it has to stride."""
    return np.array([shift, 0, 0] * width, np.uint8)


def _rounded(sigma: float) -> float:
    return round(sigma * SIGMA_STEPS) / SIGMA_STEPS


@functools.lru_cache(maxsize=1024)
def _kernel_in_memory(sigma: float) -> tuple[NDArray[np.int16], int, int]:
    """Return :func:`_half_kernel`, where that lies, and its radius."""
    kernel = _half_kernel(sigma)
    return kernel, kernel.ctypes.data, len(kernel) - 1


def _half_kernel(sigma: float) -> NDArray[np.int16]:
    """Return the middle and one side of :func:`_blur_kernel` times 2¹⁵; what rounding adds goes to the middle."""
    kernel = _blur_kernel(sigma)
    side = np.round(kernel[len(kernel) // 2 + 1 :] * np.float64(2**15)).astype(int)
    return np.array([min(2**15 - 1, 2**15 - 2 * side.sum()), *side], np.int16)


@functools.lru_cache(maxsize=1024)
def _blur_kernel(sigma: float) -> NDArray[np.float32]:
    """Return what Pillow's box filters (Gwosdek et al., 2011: boxes of fractional width) amount to along one side."""
    variance = sigma * sigma / BOX_FILTERS
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    edge = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    box = np.ones(2 * whole + 3)
    box[0] = box[-1] = edge
    box /= 2 * (whole + edge) + 1
    kernel = functools.reduce(np.convolve, [box] * BOX_FILTERS)
    while kernel[0] < NEGLIGIBLE:
        kernel = kernel[1:-1]
    # OpenCV takes more than twice as long with a kernel in double precision.
    return (kernel / kernel.sum()).astype(np.float32)
