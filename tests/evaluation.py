"""Images that stand for rows of a table, so that a test knows every feature: an image is a plain colour, its index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov2_fsdp.data.batch import IMAGE_MEAN, IMAGE_STD
from dinov2_fsdp.data.sources import BadImage

CPU = torch.device("cpu")


class TableSource:
    """``labels[i]`` is the label of image ``i``, whose colour says ``first + i``; ``broken`` ones cannot be read."""

    def __init__(
        self,
        labels: Sequence[int],
        first: int = 0,
        classes: Sequence[str] | None = None,
        broken: Sequence[int] = (),
        spec: str = "table",
    ) -> None:
        self.spec, self.first, self.broken = spec, first, set(broken)
        self.labels = np.asarray(labels, np.int64)
        self.classes = list(classes or (f"class {n}" for n in range(int(self.labels.max()) + 1)))
        self.fingerprint = f"{spec} {first} {self.labels.tolist()}"

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.spec}:{index}"

    def image(self, index: int) -> Image.Image:
        if index in self.broken:
            raise BadImage(self.name(index), "truncated")
        number = self.first + index
        return Image.new("RGB", (24, 20), (number % 256, number // 256, 0))


def indices_of(images: Tensor) -> Tensor:
    """Return which images normalised plain colours stand for; black is 0."""
    red = (images[:, 0, 0, 0] * IMAGE_STD[0] + IMAGE_MEAN[0]) * 255
    green = (images[:, 1, 0, 0] * IMAGE_STD[1] + IMAGE_MEAN[1]) * 255
    return red.round().long() + 256 * green.round().long()


class TableFeatures:
    """A backbone that looks its outputs up: class tokens of ``blocks`` (n, blocks, D) and mean patches (n, D).

    ``calls`` counts the images of each forward.
    """

    def __init__(self, blocks: Tensor, mean: Tensor | None = None) -> None:
        self.blocks = blocks
        self.mean = blocks[:, -1] if mean is None else mean
        self.calls: list[int] = []

    def __call__(self, images: Tensor) -> dict[str, Any]:
        self.calls.append(len(images))
        indices = indices_of(images) % len(self.blocks)
        chosen, patches = self.blocks[indices], self.mean[indices][:, None].repeat(1, 4, 1)
        tokens = [torch.cat([chosen[:, n : n + 1], patches], dim=1) for n in range(chosen.shape[1])]
        return {"x_norm_clstoken": chosen[:, -1], "x_norm_patchtokens": patches, "x_norm_blocks": tokens}


def blobs(count: int, seed: int, classes: int = 4, dim: int = 12, noise: float = 1.5) -> tuple[Tensor, Tensor]:
    """Return overlapping clusters: rows (count, dim) and their labels; every seed has the same centres."""
    centres = np.random.default_rng(0).normal(size=(classes, dim))
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    rows = centres[labels] + noise * rng.normal(size=(count, dim))
    return torch.tensor(rows, dtype=torch.float32), torch.tensor(labels)
