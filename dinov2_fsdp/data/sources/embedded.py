"""The rendered scenes as a source: nothing to download, labels, masks and depth known exactly."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinov2_fsdp.data.sources.base import Source
from dinov2_fsdp.errors import UserError, nearest

if TYPE_CHECKING:
    from dinov2_fsdp.data.scenes import Scene

SPLITS = ("train", "test")
KEPT_BYTES = 2**28
"""Rendered images that a process keeps: drawing one takes longer than everything else that is done to it."""

SMALLEST_SIZE = 8


@dataclass(frozen=True)
class ScenesOptions:
    """What may stand after ``scenes:``."""

    n: int = 50_000
    """Number of scenes."""
    size: int = 64
    """Side of the square images, in pixels."""
    seed: int = 0
    """Which set of scenes; no two seeds or splits share one."""
    split: str = "train"
    """``train`` or ``test``."""


class ScenesSource(Source):
    """``n`` rendered scenes. Train and test of any seeds are disjoint."""

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.options = _parse(spec)
        self._seed = len(SPLITS) * self.options.seed + SPLITS.index(self.options.split)
        self._rendered: dict[int, npt.NDArray[np.uint8]] = {}

    @property
    def classes(self) -> list[str]:
        from dinov2_fsdp.data.scenes import CLASSES

        return list(CLASSES)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        return self._labels

    @cached_property
    def _labels(self) -> npt.NDArray[np.int64]:
        return np.fromiter(map(self.label, range(len(self))), np.int64, len(self))

    @property
    def fingerprint(self) -> str:
        return f"scenes:n={self.options.n},size={self.options.size},seed={self._seed}"

    def __len__(self) -> int:
        return self.options.n

    def scene(self, index: int) -> Scene:
        """Return the scene with its mask and depth, beside what ``image`` and ``label`` give."""
        from dinov2_fsdp.data.scenes import render

        return render(self._seed, range(len(self))[index], self.options.size)

    def image(self, index: int) -> Image.Image:
        kept = self._rendered.get(index)
        if kept is None:
            kept = self.scene(index).image
            if (len(self._rendered) + 1) * kept.nbytes <= KEPT_BYTES:
                self._rendered[index] = kept
        return Image.fromarray(kept)

    def encoded(self, index: int) -> None:
        return None

    def label(self, index: int) -> int:
        from dinov2_fsdp.data.scenes import label_of

        return label_of(self._seed, range(len(self))[index])

    def name(self, index: int) -> str:
        return f"scenes:{range(len(self))[index]}"

    def __reduce__(self) -> tuple[type[ScenesSource], tuple[str]]:
        return type(self), (self.spec,)


def _parse(spec: str) -> ScenesOptions:
    """Return the options in ``scenes:KEY=VALUE,…``. Raises :class:`UserError` for unknown keys and bad values."""
    text = spec.partition(":")[2]
    keys = [field.name for field in fields(ScenesOptions)]
    values: dict[str, int | str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = part.partition("=")
        if key not in keys or not equals:
            raise UserError(
                f"{spec}: '{part}' is no option of scenes{nearest(key, keys)}\n"
                "  valid: n=50000, size=64, seed=0, split=train|test"
            )
        values[key] = value if key == "split" else _number(spec, key, value)
    options = ScenesOptions(**values)  # type: ignore[arg-type]
    if options.split not in SPLITS:
        raise UserError(
            f"{spec}: split={options.split} is not valid{nearest(options.split, SPLITS)}\n  valid: train, test"
        )
    for key, least in (("n", 1), ("size", SMALLEST_SIZE), ("seed", 0)):
        if getattr(options, key) < least:
            raise UserError(f"{spec}: {key}={getattr(options, key)} is too small\n  valid: {least} or more")
    return options


def _number(spec: str, key: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise UserError(f"{spec}: {key}={value} is not a whole number") from None
