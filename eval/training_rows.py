"""What classifiers are trained on, step by step: rows of kept features, or features of random crops.

Which images make up a step, and how they are cropped, is a function of the seed and the step alone, whatever the number
of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinov2_fsdp.data.augment import CropSpec, apply, draw
from dinov2_fsdp.data.sources import BadImage, Source
from dinov2_fsdp.data.stream import Stream
from dinov2_fsdp.parallel.world import World
from dinov2_fsdp.rng import generator
from eval.features import Extracted, Features, gather_rows, normalise

_AUGMENTATION = {"scale": (0.08, 1.0), "blur_p": 0.0, "solarize_p": 0.0, "jitter_p": 0.0, "gray_p": 0.0}


def from_features(
    whole: Extracted, kept: NDArray[np.int64], seed: int, batch: int, steps: range
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (rows, labels) of ``batch`` images for each of ``steps``, drawn from the rows ``kept`` of ``whole``."""
    stream = Stream(seed, len(kept), batch)
    for step in steps:
        chosen = torch.from_numpy(kept[stream.samples(step, 0, batch)])
        yield whole.features[chosen], whole.labels[chosen]


def from_random_crops(
    features: Features,
    pick: Callable[[dict[str, Tensor]], Tensor],
    crops: RandomCrops,
    steps: range,
    at_once: int,
    world: World,
    workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (rows, labels) of all ranks' crops for each of ``steps``; ranks share the backbone's work.

    Args:
        pick: which of the outputs a row is.
        crops: this rank's.
        at_once: images that go through the backbone at once.
    """
    loader: DataLoader[Any] = DataLoader(crops, batch_size=None, sampler=steps, num_workers=workers)
    for images, labels, ok in loader:
        with torch.no_grad():
            parts = [pick(features(normalise(part.to(world.device)))) for part in images.split(at_once)]
        rows = torch.cat(parts).float()[ok.to(world.device)]
        yield gather_rows(rows, world.size, world.device), gather_rows(labels[ok], world.size, world.device)


class RandomCrops(Dataset[Any]):
    """A rank's share of each step's random crops and flips: images uint8 (share, size, size, 3), labels, which count.

    Args:
        indices: images of ``source`` to draw from. batch: images of a step, over all ranks. size: of the crops, pixels.
    """

    def __init__(
        self, source: Source, indices: NDArray[np.int64], batch: int, size: int, seed: int, rank: int, world_size: int
    ) -> None:
        self.source, self.indices, self.batch, self.size, self.seed = source, indices, batch, size, seed
        self.share = -(-batch // world_size)
        self.first = min(rank * self.share, batch)
        self.stream = Stream(seed, len(indices), batch)
        self.spec = CropSpec(size=size, **_AUGMENTATION)  # type: ignore[arg-type]

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        # Black places fill the last ranks' shares, so that all ranks call the backbone equally often.
        images = np.zeros((self.share, self.size, self.size, 3), np.uint8)
        labels, ok = np.zeros(self.share, np.int64), np.zeros(self.share, bool)
        count = max(0, min(self.share, self.batch - self.first))
        samples = self.indices[self.stream.samples(step, self.first, count)] if count else ()
        for place, index in enumerate(samples):
            try:
                image = self.source.image(int(index))
            except BadImage:
                continue
            rng = generator(self.seed, "linear probe crop", step, self.first + place)
            images[place] = apply(image, draw(self.spec, image.width, image.height, rng), self.size)
            labels[place], ok[place] = self.source.label(int(index)), True
        return torch.from_numpy(images), torch.from_numpy(labels), torch.from_numpy(ok)
