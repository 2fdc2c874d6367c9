"""How an image looks to the student and the teacher: two global crops and several local ones.

This is the reference path, in Pillow, and it equals torchvision's transforms bit for bit. What is drawn
(:func:`draw`) is apart from how it is applied (:func:`apply`), so that the faster path, :mod:`fast_augment`, has the
very same draws and can be compared with this one.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageFilter

from dinov2_fsdp.data.sources.decoding import LazyImage
from dinov2_fsdp.errors import UserError, nearest

BLUR_PROBABILITIES: dict[str, tuple[float, float, float]] = {
    "paper": (1.0, 0.1, 0.5),
    "released": (0.0, 0.9, 0.5),
    "none": (0.0, 0.0, 0.0),
}
"""Probability of blur on global crop 1, global crop 2 and the local crops.

The released code hands ``1 - p`` to ``RandomApply`` by mistake, and the released weights were trained so.
"""

Uniform = Callable[[int], list[float]]
"""Gives so many numbers in [0, 1)."""

CROP_TRIES = 10
_NUMBERS = 11
"""Of a crop, besides its box."""
_BOX_NUMBERS = 4
"""Of a try to find one."""
JITTER_ORDERS = tuple(itertools.permutations(range(4)))


@dataclass(frozen=True)
class CropSpec:
    """The distribution of one kind of crop. Defaults are DINOv2's (2304.07193, section 4; DINO's and BYOL's before)."""

    size: int
    """Side of the square output, in pixels."""
    scale: tuple[float, float]
    """Least and greatest share of the image's area."""
    blur_p: float
    """Probability of Gaussian blur."""
    solarize_p: float
    """Probability of solarization."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and greatest aspect ratio (width over height) of the box; log-uniform between them."""
    flip_p: float = 0.5
    """Probability of a horizontal flip."""
    jitter_p: float = 0.8
    """Probability of colour jitter."""
    color_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Strengths of brightness, contrast, saturation and hue; 0 leaves that one out."""
    gray_p: float = 0.2
    """Probability of losing all colour."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Least and greatest standard deviation of the blur, in pixels of the output."""
    solarize_threshold: int = 128
    """Values from this one upwards are inverted."""

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"a crop's scale is a (least, greatest) share of the area in (0, 1], got {self.scale}")
        if not 0 <= self.color_jitter[3] <= 0.5:
            raise UserError(f"hue jitter (the fourth of {self.color_jitter}) must be in [0, 0.5]")


@dataclass(frozen=True, slots=True)
class CropParameters:
    """Everything that was drawn for one crop, in the order in which it is applied."""

    box: tuple[int, int, int, int]
    """Top, left, height, width in the image."""
    flip: bool
    jitter: tuple[tuple[str, float], ...]
    """Operations ("brightness", "contrast", "saturation", "hue") with their factors, in order; empty for none."""
    gray: bool
    blur_sigma: float | None
    solarize_threshold: int | None


def draw(spec: CropSpec, width: int, height: int, rng: np.random.Generator) -> CropParameters:
    """Return the parameters of one crop of a ``width`` × ``height`` image.

    Distributed as torchvision's ``RandomResizedCrop`` and ``ColorJitter``: factors uniform in
    [max(0, 1 - strength), 1 + strength], hue uniform in [-strength, strength], operations in random order.
    """
    return _draw(spec, width, height, lambda count: rng.random(count).tolist())


def _draw(spec: CropSpec, width: int, height: int, uniform: Uniform) -> CropParameters:
    flip, jittered, order, *factors, gray, blur, sigma, solarize = uniform(_NUMBERS)
    jitter: tuple[tuple[str, float], ...] = ()
    if jittered < spec.jitter_p:
        ranges = _jitter_ranges(spec.color_jitter)
        jitter = tuple(
            [
                (name, low + (high - low) * factors[i])
                for i in JITTER_ORDERS[int(order * len(JITTER_ORDERS))]
                for name, low, high in ranges[i]
            ]
        )
    return CropParameters(
        box=_draw_box(spec, width, height, uniform),
        flip=flip < spec.flip_p,
        jitter=jitter,
        gray=gray < spec.gray_p,
        blur_sigma=_between(*spec.blur_sigma, sigma) if blur < spec.blur_p else None,
        solarize_threshold=spec.solarize_threshold if solarize < spec.solarize_p else None,
    )


@functools.cache
def _jitter_ranges(strengths: tuple[float, float, float, float]) -> list[list[tuple[str, float, float]]]:
    """Return each operation with its least and greatest factor, in a list of its own.

    That is empty for a strength of 0, which is left out and not applied: the way to HSV and back is not lossless.
    """
    *blended, hue = strengths
    ranges = [(max(0.0, 1 - strength), 1 + strength) for strength in blended] + [(-hue, hue)]
    names = ("brightness", "contrast", "saturation", "hue")
    return [[(name, *both)] if by > 0 else [] for name, by, both in zip(names, strengths, ranges, strict=True)]


def _many_at_a_time(rng: np.random.Generator, count: int) -> Uniform:
    """Return the generator's numbers as single calls would give them, ``count`` drawn at once.

    Two dozen calls to it take as long as the blur of a small image. The generator is left behind numbers that nobody
    took, so that it should have no other use.
    """
    waiting = rng.random(count)[::-1].tolist()

    def uniform(wanted: int) -> list[float]:
        if len(waiting) < wanted:
            waiting[:0] = rng.random(count)[::-1].tolist()
        taken = waiting[: -wanted - 1 : -1]
        del waiting[-wanted:]
        return taken

    return uniform


def apply(image: Image.Image, parameters: CropParameters, size: int) -> NDArray[np.uint8]:
    """Return the crop that ``parameters`` describe, (size, size, 3) uint8, read-only.

    Crop, bicubic resize, flip, jitter, gray, blur, solarize: equal to ``torchvision.transforms.functional``
    on Pillow images, and to Pillow's ``GaussianBlur`` (as in DINO's code; DINOv2's cuts the kernel at 9 pixels).

    Args:
        image: of mode RGB, any size.
    """
    top, left, height, width = parameters.box
    # resize(box=...) would be one copy less, but its filter looks at pixels beyond the box.
    crop = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)
    if parameters.flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for operation, factor in parameters.jitter:
        crop = _adjust(crop, operation, factor)
    if parameters.gray:
        crop = crop.convert("L").convert("RGB")
    if parameters.blur_sigma is not None:
        crop = crop.filter(ImageFilter.GaussianBlur(parameters.blur_sigma))
    pixels = np.frombuffer(crop.tobytes(), np.uint8).reshape(size, size, 3)
    if parameters.solarize_threshold is not None:
        pixels = np.where(pixels < parameters.solarize_threshold, pixels, 255 - pixels)
    return pixels


@dataclass(frozen=True)
class MultiCrop:
    """DINO's multi-crop (2104.14294, section 3.1): a pure function from an image and a generator to its crops."""

    global_1: CropSpec
    global_2: CropSpec
    local: CropSpec
    n_local: int

    def draw(self, width: int, height: int, rng: np.random.Generator) -> list[CropParameters]:
        """Return the parameters of all crops: the two global ones, then the local ones."""
        specs = [self.global_1, self.global_2, *[self.local] * self.n_local]
        uniform = _many_at_a_time(rng, (_NUMBERS + 2 * _BOX_NUMBERS) * len(specs))  # nearly all boxes take a try or two
        return [_draw(spec, width, height, uniform) for spec in specs]

    def fill(
        self,
        image: LazyImage,
        parameters: Sequence[CropParameters],
        global_crops: NDArray[np.uint8],
        local_crops: NDArray[np.uint8],
    ) -> None:
        """Write what was drawn into ``global_crops`` (2, 3, S, S) and ``local_crops`` (n_local, 3, s, s), uint8.

        Raises:
            BadImage: the image cannot be decoded.
        """
        picture = image.rgb()
        for crop, drawn in zip([*global_crops, *local_crops], parameters, strict=True):
            crop[...] = apply(picture, drawn, crop.shape[-1]).transpose(2, 0, 1)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Return the global crops (2, S, S, 3) and the local crops (n_local, s, s, 3) of an RGB image, uint8."""
        global_size, local_size = self.global_1.size, self.local.size
        global_crops = np.empty((2, 3, global_size, global_size), np.uint8)
        local_crops = np.empty((self.n_local, 3, local_size, local_size), np.uint8)
        self.fill(LazyImage.of(image), self.draw(*image.size, rng), global_crops, local_crops)
        return global_crops.transpose(0, 2, 3, 1), local_crops.transpose(0, 2, 3, 1)


def multi_crop(
    *,
    global_size: int,
    global_scale: tuple[float, float],
    local_size: int,
    local_scale: tuple[float, float],
    n_local: int,
    blur: str,
    flip_p: float = CropSpec.flip_p,
    jitter_p: float = CropSpec.jitter_p,
    color_jitter: tuple[float, float, float, float] = CropSpec.color_jitter,
    gray_p: float = CropSpec.gray_p,
    blur_sigma: tuple[float, float] = CropSpec.blur_sigma,
    solarize_p: float = 0.2,
    kind: type[MultiCrop] = MultiCrop,
) -> MultiCrop:
    """Return DINOv2's augmentation: blur differs between the three kinds of crop, only global crop 2 is solarized.

    Args:
        global_size, local_size: sides of the crops, in pixels.
        global_scale, local_scale: (least, greatest) share of the image's area.
        blur: "paper", "released" or "none", see :data:`BLUR_PROBABILITIES`.
        solarize_p: probability of solarizing global crop 2.
        kind: the implementation.

    Raises:
        UserError: for an unknown ``blur``, an impossible scale or hue.
    """
    if blur not in BLUR_PROBABILITIES:
        valid = ", ".join(BLUR_PROBABILITIES)
        raise UserError(f"blur is one of {valid}; got {blur!r}{nearest(blur, BLUR_PROBABILITIES)}")

    def spec(size: int, scale: tuple[float, float], blur_p: float, solarize_p: float = 0.0) -> CropSpec:
        return CropSpec(
            size=size,
            scale=scale,
            blur_p=blur_p,
            solarize_p=solarize_p,
            flip_p=flip_p,
            jitter_p=jitter_p,
            color_jitter=color_jitter,
            gray_p=gray_p,
            blur_sigma=blur_sigma,
        )

    blur_1, blur_2, blur_local = BLUR_PROBABILITIES[blur]
    return kind(
        global_1=spec(global_size, global_scale, blur_1),
        global_2=spec(global_size, global_scale, blur_2, solarize_p),
        local=spec(local_size, local_scale, blur_local),
        n_local=n_local,
    )


def _between(low: float, high: float, u: float) -> float:
    return low + (high - low) * u


def _draw_box(spec: CropSpec, width: int, height: int, uniform: Uniform) -> tuple[int, int, int, int]:
    least, greatest = spec.ratio
    log_least, log_greatest = _logarithms(spec.ratio)
    for _ in range(CROP_TRIES):
        u_area, u_ratio, u_top, u_left = uniform(_BOX_NUMBERS)
        area = width * height * _between(*spec.scale, u_area)
        ratio = math.exp(_between(log_least, log_greatest, u_ratio))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w
    # No such box fits (a banner, or a scale near 1): the largest central one of an allowed ratio.
    w, h = width, height
    if width / height < least:
        h = round(width / least)
    elif width / height > greatest:
        w = round(height * greatest)
    return (height - h) // 2, (width - w) // 2, h, w


@functools.cache
def _logarithms(bounds: tuple[float, float]) -> tuple[float, float]:
    return math.log(bounds[0]), math.log(bounds[1])


def _adjust(image: Image.Image, operation: str, factor: float) -> Image.Image:
    # What ImageEnhance does, less what it costs on small crops (its mean alone takes longer than the blend).
    if operation == "hue":
        shift = Image.new("HSV", image.size, (int(factor * 255) % 256, 0, 0))
        return ImageChops.add_modulo(image.convert("HSV"), shift).convert("RGB")
    if operation == "brightness":
        degenerate = Image.new("RGB", image.size)
    elif operation == "contrast":
        gray = np.frombuffer(image.convert("L").tobytes(), np.uint8)
        mean = int(int(gray.sum()) / gray.size + 0.5)
        degenerate = Image.new("RGB", image.size, (mean, mean, mean))
    else:
        degenerate = image.convert("L").convert("RGB")
    return Image.blend(degenerate, image, factor)
