"""How an image and its classes are changed for training a segmentation head: the protocol of ADE20K's linear heads.

Scale, crop, flip and photometric distortion as in MMSegmentation's ADE20K recipe, which DINOv2's released
evaluations use.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eval.dense import Sample, short_side_size, to_input

VOID = 255
"""Class of pixels that do not count."""
SCALES = (0.5, 2.0)
LARGEST_SHARE = 0.75
CROP_TRIES = 10
LONGEST = 4.0
"""The longer side's bound in short sides: (2048, 512) in the published recipe."""


def training_sample(
    image: Image.Image,
    labels: NDArray[np.uint8],
    short_side: int,
    crop: int,
    rng: np.random.Generator,
    scales: tuple[float, float] = SCALES,
    longest: float = LONGEST,
) -> Sample:
    """Return a random crop: image (3, crop, crop) and classes (crop, crop) int64, ``VOID`` beyond the image's edges.

    The shorter side becomes ``short_side`` times a factor within ``scales``, or less where the longer one would exceed
    ``longest`` (0: any) times that; a crop with more than 75 % of one class is drawn
    anew, ten times at most; flipped half of the time; colours distorted.
    """
    short = short_side * rng.uniform(*scales)
    size = short_side_size(labels.shape[0], labels.shape[1], short, (longest or math.inf) * short)
    image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    labels = np.asarray(Image.fromarray(labels).resize(size[::-1], Image.Resampling.NEAREST))
    top, left = _varied_crop(labels, crop, rng)
    pixels = np.asarray(image)[top : top + crop, left : left + crop]
    labels = labels[top : top + crop, left : left + crop]
    if rng.random() < 0.5:
        pixels, labels = pixels[:, ::-1], labels[:, ::-1]
    normal = to_input(distort(pixels, rng))
    below, right = crop - labels.shape[0], crop - labels.shape[1]
    normal = np.pad(normal, ((0, 0), (0, below), (0, right)))
    return normal, np.pad(labels, ((0, below), (0, right)), constant_values=VOID).astype(np.int64)


def _varied_crop(labels: NDArray[np.uint8], crop: int, rng: np.random.Generator) -> tuple[int, int]:
    top = left = 0
    for _ in range(CROP_TRIES):
        top = int(rng.integers(max(labels.shape[0] - crop, 0) + 1))
        left = int(rng.integers(max(labels.shape[1] - crop, 0) + 1))
        counts = np.bincount(labels[top : top + crop, left : left + crop].ravel(), minlength=VOID + 1)[:VOID]
        if np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < LARGEST_SHARE:
            break
    return top, left


def distort(pixels: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return an image (H, W, 3) with other brightness (± 32), contrast and saturation (.5 … 1.5) and hue (± 18°).

    Each is changed half of the time; contrast, half of the time, last instead of second.
    """
    brightness, contrast, saturation, hue = rng.random(4) < 0.5
    contrast_last = rng.random() < 0.5
    amounts = rng.uniform([-32, 0.5, 0.5, -18], [32, 1.5, 1.5, 18])
    values = pixels.astype(np.float32)
    if brightness:
        values = np.clip(values + amounts[0], 0, 255)
    if contrast and not contrast_last:
        values = np.clip(values * amounts[1], 0, 255)
    if saturation or hue:
        hsv = np.array(Image.fromarray(values.astype(np.uint8)).convert("HSV"), np.float32)
        if saturation:
            hsv[..., 1] = np.clip(hsv[..., 1] * amounts[2], 0, 255)
        if hue:
            hsv[..., 0] = (hsv[..., 0] + amounts[3] / 360 * 255) % 256
        values = np.asarray(Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB"), np.float32)
    if contrast and contrast_last:
        values = np.clip(values * amounts[1], 0, 255)
    return values.astype(np.uint8)
