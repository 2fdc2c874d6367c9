"""The colour operations of many crops at once, in torch, on the device that trains.

A data worker then only cuts out, resamples and flips, and sends along what was drawn (:class:`ColourPlan`). Which rows
an operation changes is worked out in the worker too, so that a GPU has no masks to look through and never makes the
host wait. Every operation gives Pillow's values, those of :func:`augment.apply`, bit for bit: its integers and
roundings are repeated in its order, with 32 bits where they are exact and 64 where Pillow rounds a double. (Pillow as
it is built for x86-64; where a compiler fuses products and sums, a blend may differ by one level.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinov2_fsdp.data.augment import CropParameters

VALUES_AT_ONCE = 2**22
"""So many values of crops are worked at together, with temporary tensors of up to 110 MiB."""

_GRAY, _BLUR, _SOLARIZE = 4, 5, 6
"""Stages after the four of the colour jitter."""

_BOX_FILTERS = 3
_FIXED_POINT = 24
"""Bits behind the point in the weights of Pillow's box filter."""


class Segment(NamedTuple):
    """One operation on several rows, with ``width`` numbers for each of them."""

    operation: str
    rows: int
    width: int


@dataclass(frozen=True)
class ColourPlan:
    """What to do with the colours of a microbatch's crops of one kind, one segment after the other.

    Attributes:
        segments: the operations in their order; a row occurs in several of them.
        rows: int64, the segments' rows one after the other. values: float32, their numbers likewise.
    """

    segments: tuple[Segment, ...]
    rows: Tensor
    values: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> ColourPlan:
        """Return the plan with ``function`` of its tensors, for instance on another device."""
        return ColourPlan(self.segments, function(self.rows), function(self.values))

    def apply_(self, crops: Tensor) -> Tensor:
        """Colour ``crops`` ``(rows, 3, S, S)`` uint8, on the plan's device, in their own memory; return them."""
        at_once = max(1, VALUES_AT_ONCE // math.prod(crops.shape[1:]))
        rows = self.rows.split([segment.rows for segment in self.segments])
        values = self.values.split([segment.rows * segment.width for segment in self.segments])
        for segment, of_rows, of_values in zip(self.segments, rows, values, strict=True):
            operation = _OPERATIONS[segment.operation]
            shaped = of_values.view(segment.rows, segment.width, 1, 1, 1)
            for part, numbers in zip(of_rows.split(at_once), shaped.split(at_once), strict=True):
                coloured = operation(crops.index_select(0, part), numbers.unbind(1))
                crops.index_copy_(0, part, coloured.to(torch.uint8))
        return crops


def plan_colours(parameters: Sequence[CropParameters]) -> ColourPlan:
    """Return the plan for crops of which row ``i`` was drawn as ``parameters[i]``, on the CPU."""
    groups: dict[tuple[int, str, int], tuple[list[int], list[float]]] = {}
    for row, drawn in enumerate(parameters):
        for stage, operation, numbers in _stages(drawn):
            rows, values = groups.setdefault((stage, operation, len(numbers)), ([], []))
            rows.append(row)
            values.extend(numbers)
    ordered = sorted(groups.items())
    return ColourPlan(
        segments=tuple(Segment(operation, len(rows), width) for (_, operation, width), (rows, _) in ordered),
        rows=torch.tensor([row for _, (rows, _) in ordered for row in rows], dtype=torch.int64),
        values=torch.tensor([value for _, (_, values) in ordered for value in values], dtype=torch.float32),
    )


def _stages(drawn: CropParameters) -> Iterator[tuple[int, str, Sequence[float]]]:
    """Yield (stage, operation, its numbers) of one crop, in the order in which they are applied."""
    for stage, (operation, factor) in enumerate(drawn.jitter):
        yield stage, operation, (int(factor * 255) % 256 if operation == "hue" else factor,)
    if drawn.gray:
        yield _GRAY, "gray", ()
    if drawn.blur_sigma is not None:
        yield _BLUR, "blur", box_weights(drawn.blur_sigma)
    if drawn.solarize_threshold is not None:
        yield _SOLARIZE, "solarize", (drawn.solarize_threshold,)


def box_weights(sigma: float) -> list[int]:
    """Return the weights, in units of 2^-24, of the box filter of which Pillow runs three for a Gaussian.

    The box has a fractional width (Gwosdek et al., 2011): its two outer pixels count for less than those between.
    """
    single = np.float32  # as Pillow computes: the last bit of a weight moves values that lie between two levels
    variance = single(sigma) * single(sigma) / single(_BOX_FILTERS)
    length = single(math.sqrt(12 * float(variance) + 1))
    whole = single(math.floor((float(length) - 1) / 2))
    next_square = (whole + single(1)) * (whole + single(1))
    edge = (single(2) * whole + single(1)) * (whole * (whole + single(1)) - single(3) * variance)
    edge = edge / (single(6) * (variance - next_square))
    inner = int(single(2**_FIXED_POINT) / (single(2) * (whole + edge) + single(1)))
    taps = 2 * int(whole) + 1
    outer = (2**_FIXED_POINT - taps * inner) // 2
    return [outer, *[inner] * taps, outer]


# Each takes crops (n, 3, S, S) uint8 and its numbers, each (n, 1, 1, 1); what it returns holds whole numbers of 0 to
# 255, or what has to be cut off to become such.


def _brightness(crops: Tensor, numbers: Sequence[Tensor]) -> Tensor:
    return _blend(crops.new_zeros((), dtype=torch.float32), crops.float(), numbers[0])


def _contrast(crops: Tensor, numbers: Sequence[Tensor]) -> Tensor:
    values = crops.float()
    luma = _luma(values)
    pixels = math.prod(luma.shape[1:])
    # Whole numbers: a sum of so many in single precision would round, and a mean of .5 has to go upwards.
    total = luma.sum(dim=(1, 2, 3), keepdim=True, dtype=torch.int64)
    return _blend(((2 * total + pixels) // (2 * pixels)).float(), values, numbers[0])


def _saturation(crops: Tensor, numbers: Sequence[Tensor]) -> Tensor:
    values = crops.float()
    return _blend(_luma(values), values, numbers[0])


def _gray(crops: Tensor, numbers: Sequence[Tensor]) -> Tensor:
    return _luma(crops.float()).expand(crops.shape)


def _solarize(crops: Tensor, numbers: Sequence[Tensor]) -> Tensor:
    return torch.where(crops < numbers[0], crops, 255 - crops)


def _hue(crops: Tensor, numbers: Sequence[Tensor]) -> Tensor:
    hue, saturation, value = _to_hsv(crops.float())
    return _to_rgb((hue + numbers[0]) % 256, saturation, value)


def _blur(crops: Tensor, numbers: Sequence[Tensor]) -> Tensor:
    weights = [number.int() for number in numbers]
    # Around zero, products of 8 and 24 bits fit into 32. The weights may add up to one less than 2^24.
    values = crops.int() - 128
    rounding = 2 ** (_FIXED_POINT - 1) - 128 * (2**_FIXED_POINT - sum(weights[1:], weights[0]))
    for axis in (3, 2):
        for _ in range(_BOX_FILTERS):
            values = _box_filter(values, weights, rounding, axis)
    return values + 128


def _box_filter(values: Tensor, weights: Sequence[Tensor], rounding: Tensor, axis: int) -> Tensor:
    size, margin = values.shape[axis], len(weights) // 2
    first, last = values.narrow(axis, 0, 1), values.narrow(axis, size - 1, 1)
    padded = torch.cat([*[first] * margin, values, *[last] * margin], axis)
    total = padded.narrow(axis, 0, size) * weights[0]
    for place, weight in enumerate(weights[1:], 1):
        total.addcmul_(padded.narrow(axis, place, size), weight)
    return total.add_(rounding).bitwise_right_shift_(_FIXED_POINT)


def _blend(degenerate: Tensor, values: Tensor, factor: Tensor) -> Tensor:
    # A product and a sum, not lerp, whose roundings are others.
    return (values - degenerate).mul_(factor).add_(degenerate).clamp_(0, 255)


def _luma(values: Tensor) -> Tensor:
    """Return Pillow's L of float32 RGB, (n, 1, S, S): every sum stays below 2^24, so that float32 is exact."""
    red, green, blue = values.split(1, dim=1)
    return (red * 19595).add_(green * 38470).add_(blue * 7471).add_(0x8000).mul_(2**-16).floor_()


def _to_hsv(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return hue, saturation and value of float32 RGB, each (n, 1, S, S) with whole numbers of 0 to 255."""
    red, green, _ = values.split(1, dim=1)
    value = values.amax(1, keepdim=True)
    chroma = value - values.amin(1, keepdim=True)
    saturation = (chroma / value.clamp(min=1)).double().mul_(255).floor_()
    from_red, from_green, from_blue = ((value - values) / chroma.clamp(min=1)).split(1, dim=1)
    is_red, is_green = red == value, green == value
    more = torch.where(is_red, from_blue, torch.where(is_green, from_red, from_green))
    less = torch.where(is_red, from_green, torch.where(is_green, from_blue, from_red))
    sixths = torch.where(is_red, 0.0, torch.where(is_green, 2.0, 4.0)).double().add_(more).sub_(less).float()
    turn = sixths.double().mul_(1 / 6).add_(1).frac_().float()
    return turn.double().mul_(255).floor_().float(), saturation.float(), value


def _to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Return RGB (n, 3, S, S) of hue, saturation and value.

    A channel is v·(1 − s·w), w being how far the hue is from where that channel is full: at most 1, in sixths of a
    turn. With s and w in steps of 1/255 the product is a whole number below 2^24; no quotient lies between two levels.
    """
    channels = []
    for sixths in (5, 3, 1):
        turned = (6 * hue + 255 * sixths) % (6 * 255)
        distance = torch.minimum(turned, 4 * 255 - turned).clamp_(0, 255)
        product = (255 * 255 - saturation * distance).mul_(value)
        channels.append(product.double().mul_(1 / 255**2).round_().to(torch.uint8))
    return torch.cat(channels, 1)


_OPERATIONS: dict[str, Callable[[Tensor, Sequence[Tensor]], Tensor]] = {
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": _saturation,
    "hue": _hue,
    "gray": _gray,
    "blur": _blur,
    "solarize": _solarize,
}
