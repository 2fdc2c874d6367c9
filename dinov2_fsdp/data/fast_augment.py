"""The augmentation of :mod:`augment`, several times as fast: the same draws, pixels that differ by rounding.

What makes it fast: a JPEG file is decoded at a reduced size when every crop is shrunk by more than that anyway; where
a processor has AVX-512, compiled code (:mod:`dinov2_fsdp.native`) resamples with Pillow's filter straight into the
crop's planes (``resample.cpp``), and its colours are one pass (``colours.cpp``), equal to Pillow's but for hue.
Elsewhere the resampling is torch's (the same filter in fixed point) and colours and blur are OpenCV's. The blur has the
kernel that Pillow's three box filters amount to.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from dataclasses import replace

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

OPERATIONS = ("brightness", "contrast", "saturation", "hue")
"""As compiled code numbers them."""

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
        crops = [*global_crops, *local_crops]
        sizes = [crop.shape[-1] for crop in crops]
        factor = reduction(parameters, sizes) if image.reducible else 1
        pixels = image.pixels(factor)
        moved = [replace(drawn, box=reduced_box(drawn.box, factor, pixels)) for drawn in parameters]
        # One stage after the other over all crops: each leaves the processor's caches to its own code.
        resized = [resize(pixels, drawn, crop) for crop, drawn in zip(crops, moved, strict=True)]
        for crop, picture, drawn in zip(crops, resized, moved, strict=True):
            recolour(picture, drawn, crop)


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
    planes = np.empty((3, size, size), np.uint8)
    recolour(resize(pixels, parameters, planes), parameters, planes)
    return planes.transpose(1, 2, 0)


def resize(pixels: NDArray[np.uint8], parameters: CropParameters, planes: NDArray[np.uint8]) -> MatLike | None:
    """Resample what lies in the box, and flip it if that was drawn.

    Returns:
        None if it is in ``planes``, (3, size, size), where compiled code writes it; otherwise (size, size, 3), which is
        a copy in any case.
    """
    top, left, height, width = parameters.box
    crop, size = pixels[top : top + height, left : left + width], planes.shape[-1]
    compiled = library()
    if (
        compiled is not None
        and "resample" in compiled.names
        and planes.flags.c_contiguous
        and pixels.flags.c_contiguous
        and pixels.dtype == np.uint8
    ):
        box = (crop.ctypes.data, pixels.strides[0], height, width)
        compiled.resample(*box, size, int(parameters.flip), planes.ctypes.data)
        return None
    resized = _resize(crop, size)
    return cv2.flip(resized, 1) if parameters.flip else resized


def _resize(crop: NDArray[np.uint8], size: int) -> MatLike:
    """Return a crop resampled by torch, (size, size, 3); a copy in any case."""
    height, width, _ = crop.shape
    if (height, width) == (size, size):
        return crop.copy()
    # The batch dimension first: torch then knows the image as channels-last, and gives such a one back.
    image = torch.from_numpy(crop)[None].permute(0, 3, 1, 2)
    return F.interpolate(image, (size, size), mode="bicubic", antialias=True).numpy()[0].transpose(1, 2, 0)


def recolour(crop: MatLike | None, parameters: CropParameters, planes: NDArray[np.uint8]) -> None:
    """Give a crop, as :func:`resize` returned it, all that ``parameters`` ask for beside their box and flip.

    The result is in ``planes``, (3, size, size). The crop's own memory may be written to as well: fresh memory would
    take a third of the time again.
    """
    if crop is None:
        compiled = library()
        assert compiled is not None  # what has resampled
        _compiled_recolour(compiled, parameters, planes)
        return
    found = _recolour(crop, parameters)
    if found.ndim == 2:
        planes[...] = found
    else:
        cv2.split(found, [*planes])


def _compiled_recolour(compiled: Library, drawn: CropParameters, planes: NDArray[np.uint8]) -> None:
    count, factors = len(drawn.jitter), [_shift(by) if name == "hue" else by for name, by in drawn.jitter]
    kinds = (ctypes.c_int * count)(*[OPERATIONS.index(name) for name, _ in drawn.jitter])
    kernel = None if drawn.blur_sigma is None else _half_kernel(_rounded(drawn.blur_sigma))
    compiled.recolour(
        *(planes.shape[-1], count, kinds, (ctypes.c_float * count)(*factors)),
        *(int(drawn.gray), None if kernel is None else kernel.ctypes.data, -1 if kernel is None else len(kernel) - 1),
        *(256 if drawn.solarize_threshold is None else drawn.solarize_threshold, planes.ctypes.data),
    )


def _recolour(crop: MatLike, parameters: CropParameters) -> MatLike:
    """Return the crop by OpenCV; (size, size) if it is grey."""
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
