"""How an image and its depth are changed for training a depth head."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from eval.dense import Sample, to_input

NYU_BORDER = (45, 43, 472, 608)
"""Top, left, bottom, right of what NYUv2's images show inside their white border."""


def training_sample(
    image: Image.Image, depth: NDArray[np.floating], crop: tuple[int, int], nyu: bool, rng: np.random.Generator
) -> Sample:
    """Return an augmented image (3, H, W) and its depth (H, W) float32, 0 where unknown.

    For NYUv2 its border off and a rotation by up to 2.5° half of the time; mirrored half of the time, a random crop,
    gamma, brightness and colours changed half of the time: the recipe of BTS (arXiv 1907.10326) that published heads
    use.

    Args:
        crop: height and width, pixels; 0, 0: the whole image. nyu: the image is one of NYUv2's.
    """
    depths = Image.fromarray(np.asarray(depth, np.float32))
    if nyu:
        top, left, bottom, right = NYU_BORDER
        image, depths = (picture.crop((left, top, right, bottom)) for picture in (image, depths))
        angle = rng.uniform(-2.5, 2.5) if rng.random() < 0.5 else 0.0
        image = image.rotate(angle, Image.Resampling.BILINEAR)
        depths = depths.rotate(angle, Image.Resampling.NEAREST)
    if rng.random() < 0.5:
        image, depths = (picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for picture in (image, depths))
    height, width = crop
    if height and width:
        top = int(rng.integers(max(image.height - height, 0) + 1))
        left = int(rng.integers(max(image.width - width, 0) + 1))
        box = (left, top, left + width, top + height)
        image, depths = image.crop(box), depths.crop(box)
    if rng.random() < 0.5:
        image = _colour(image, rng)
    return to_input(image), np.asarray(depths, np.float32).copy()


def _colour(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    gamma, brightness = rng.uniform(0.9, 1.1), rng.uniform(0.75, 1.25)
    bright = ImageEnhance.Brightness(image.point([round(255 * (v / 255) ** gamma) for v in range(256)] * 3))
    pixels = np.asarray(bright.enhance(brightness), np.float32) * rng.uniform(0.9, 1.1, 3)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
