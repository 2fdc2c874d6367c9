"""Images of coloured squares whose classes a linear head can tell, and their segmentation by a tiny head."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from evaluation import CPU
from PIL import Image

from dinov2_fsdp.data.sources import BadImage
from dinov2_fsdp.parallel.world import World
from eval.pairs import Pairs
from eval.segmentation import Settings, segment

ALONE = World(0, 1, 0, CPU)
PATCH = 4
SMALL = Settings(
    classes=3, first_class=1, void=(0,), short_side=24, crop=16, stride=8, batch=3, iterations=60, warmup=5, rate=0.05,
    train_batch=4,
)  # fmt: skip


def grid(images: torch.Tensor) -> torch.Tensor:
    """The mean colour of each patch."""
    return F.avg_pool2d(images, PATCH)


class Coloured(Pairs):
    """Images of coloured squares; the class is the strongest of red, green and blue, the left edge is void."""

    spec = "coloured"

    def __init__(
        self,
        count: int,
        seed: int = 0,
        sizes: tuple[tuple[int, int], ...] = ((24, 32), (40, 24)),
        broken: tuple[int, ...] = (),
    ) -> None:
        self.count, self.seed, self.sizes, self.broken = count, seed, sizes, broken

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"coloured:{index}"

    def size(self, index: int) -> tuple[int, int]:
        return self.sizes[index % len(self.sizes)]

    def _classes(self, index: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, index])
        height, width = self.size(index)
        return rng.integers(3, size=(height // 8, width // 8)).repeat(8, 0).repeat(8, 1)

    def image(self, index: int) -> Image.Image:
        if index in self.broken:
            raise BadImage(self.name(index), "truncated")
        classes = self._classes(index)
        rng = np.random.default_rng([self.seed, index, 1])
        pixels = rng.integers(0, 120, (*classes.shape, 3)) + 130 * (classes[..., None] == np.arange(3))
        return Image.fromarray(pixels.astype(np.uint8))

    def target(self, index: int) -> np.ndarray:
        values = self._classes(index) + 1
        values[:, :2] = 0
        return values


def sizes_of(pairs: Pairs) -> list[tuple[int, int]]:
    return [pairs.size(index) for index in range(len(pairs))]


def measured(
    world: World = ALONE, settings: Settings = SMALL, broken: tuple[int, ...] = (), **more: Any
) -> tuple[dict[str, float], dict[str, Any]]:
    test = Coloured(7, seed=1, broken=broken)
    return segment(grid, PATCH, Coloured(20), test, sizes_of(test), settings, world, progress=False, **more)
