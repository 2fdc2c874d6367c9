"""What tasks with a value per pixel share: patch grids of any image size, a linear head, its schedule, windows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dinov2_fsdp.data.batch import IMAGE_MEAN, IMAGE_STD
from dinov2_fsdp.data.sources import BadImage
from dinov2_fsdp.data.stream import Stream
from dinov2_fsdp.errors import UserError
from dinov2_fsdp.parallel.world import World
from dinov2_fsdp.rng import generator
from eval.features import Features, gather_rows, prepare, progress_bar, reduce_over_ranks
from eval.pairs import Pairs
from eval.resumption import Resumption

Grid = Callable[[Tensor], Tensor]
"""Normalised images (B, 3, H, W) whose sides the patch divides, to features (B, C, H / patch, W / patch)."""
KEPT = 512
"""Training images whose features an evaluation during pretraining keeps."""
_OTHERS = 100
"""How many pairs are tried in the place of one that cannot be read."""
Sample = tuple[NDArray[np.float32], NDArray[Any]]
"""A normalised image (3, H, W) and its target (H, W)."""


def grid_of(features: Features, patch: int, pick: Callable[[dict[str, Tensor], int, int], Tensor]) -> Grid:
    """Return the function from images to a grid of features, without gradients, in fp32."""

    def grid(images: Tensor) -> Tensor:
        rows, columns = images.shape[2] // patch, images.shape[3] // patch
        with torch.no_grad():
            return pick(features(images), rows, columns).float()

    return grid


def on_pixels(images: Tensor, patch: int, head: Callable[[Tensor], Tensor], grid: Grid) -> Tensor:
    """Return a head's outputs for every pixel: (B, channels, H, W), bilinear between the middles of patches.

    Images of any size are padded around with zeros (ImageNet's mean colour) until the patch divides them.
    """
    height, width = images.shape[2:]
    below, right = -height % patch, -width % patch
    top, left = below // 2, right // 2
    padded = F.pad(images, (left, right - left, top, below - top))
    outputs = F.interpolate(head(grid(padded)), size=padded.shape[2:], mode="bilinear", align_corners=False)
    return outputs[:, :, top : top + height, left : left + width]


def to_input(image: Image.Image | NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return an RGB image as (3, H, W), ImageNet's mean and deviation taken out."""
    pixels = np.asarray(image, np.float32) / 255
    normal = (pixels - np.array(IMAGE_MEAN, np.float32)) / np.array(IMAGE_STD, np.float32)
    return np.ascontiguousarray(normal.transpose(2, 0, 1))


class InputNorm(nn.Module):
    """BatchNorm of a head's inputs over the images of all ranks.

    The inputs are frozen features, so their statistics carry no gradient; what ranks exchange is two vectors.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, world_size: int = 1, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.world_size, self.momentum, self.eps = world_size, momentum, eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, inputs: Tensor, counted: int | None = None) -> Tensor:
        """Return the normalised inputs (B, C, h, w); in training the first ``counted`` images make the statistics."""
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = self._statistics(inputs.detach()[:counted])
        scale = self.weight * (var + self.eps).rsqrt()
        return inputs * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]

    @torch.no_grad()
    def _statistics(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        values = inputs.double()
        sums = torch.cat(
            [values.sum((0, 2, 3)), values.square().sum((0, 2, 3)), values.new_tensor([values[:, 0].numel()])]
        )
        if self.world_size > 1:
            dist.all_reduce(sums)
        channels, count = inputs.shape[1], sums[-1]
        mean = sums[:channels] / count
        var = (sums[channels:-1] / count - mean.square()).clamp(min=0)
        unbiased = var * count / (count - 1).clamp(min=1)
        for kept, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            kept.lerp_(new.to(kept.dtype), self.momentum)
        return mean.float(), var.float()


class LinearHead(nn.Module):
    """A linear layer on each patch, behind a BatchNorm if asked for; weights normal .01, biases 0."""

    def __init__(self, inputs: int, outputs: int, norm: bool, seed: int, world_size: int = 1) -> None:
        super().__init__()
        self.norm = InputNorm(inputs, world_size) if norm else None
        self.linear = nn.Conv2d(inputs, outputs, 1)
        drawn = generator(seed, "dense head").standard_normal((outputs, inputs, 1, 1))
        with torch.no_grad():
            self.linear.weight.copy_(0.01 * torch.from_numpy(drawn))
            nn.init.zeros_(self.linear.bias)  # type: ignore[arg-type]

    def forward(self, inputs: Tensor, counted: int | None = None) -> Tensor:
        """Return (B, outputs, h, w); ``counted``: see :class:`InputNorm`."""
        return self.linear(inputs if self.norm is None else self.norm(inputs, counted))


class KeptSamples(Dataset[Any]):
    """Samples whose features were made once: each step draws ``batch`` of them, with nothing changed.

    Args:
        grids: (n, C, h, w). targets: (n, H, W).
    """

    def __init__(self, grids: Tensor, targets: Tensor, batch: int, seed: int) -> None:
        self.grids, self.targets, self.batch = grids, targets, batch
        self.stream = Stream(seed, len(grids), batch)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, int]:
        chosen = torch.from_numpy(self.stream.samples(step, 0, self.batch))
        return self.grids[chosen], self.targets[chosen], self.batch


def keep_grids(
    grid: Grid,
    pairs: Pairs,
    target: Callable[[int], NDArray[Any]],
    count: int,
    size: int,
    batch: int,
    world: World,
    void: float,
) -> tuple[Tensor, Tensor]:
    """Return (features (count, C, h, w), targets (count, size, size)) of central crops; ranks share the forwards.

    Args:
        target: of a pair, (H, W). size: side of the crops, pixels; a multiple of the patch.
        void: what fills the targets of pairs that cannot be read.
    """
    rows: list[Tensor] = []
    readable = torch.ones(count, dtype=torch.int64)
    share = list(own_share(count, world.rank, world.size))

    def crop(index: int | None) -> NDArray[np.float32]:
        # Places without an image of their own are filled: a sharded backbone's forward is collective.
        if index is not None:
            try:
                return to_input(prepare(pairs.image(index), size, size))
            except BadImage as error:
                readable[index] = 0
                leave_out(error)
        return np.zeros((3, size, size), np.float32)

    for start in range(0, len(share), batch):
        part = share[start : start + batch]
        found = grid(torch.from_numpy(np.stack([crop(index) for index in part])).to(world.device))
        rows.append(found[[place for place, index in enumerate(part) if index is not None]].cpu())
    everyone = gather_rows(torch.cat(rows), world.size, world.device)
    order = np.argsort(np.concatenate([np.arange(rank, count, world.size) for rank in range(world.size)]))
    readable = reduce_over_ranks(readable, world.size, world.device, dist.ReduceOp.MIN)

    def values(index: int) -> NDArray[Any]:
        try:
            found = _central(target(index), size)
        except BadImage:
            readable[index] = 0
            found = np.zeros((size, size))
        return found if readable[index] else np.full_like(found, void)

    targets = [values(index) for index in range(count)]
    kinds = {kept.dtype for kept, ok in zip(targets, readable.tolist(), strict=True) if ok}
    if not kinds:
        raise UserError(f"'{pairs.spec}': none of {count} pairs can be read")
    return everyone[torch.from_numpy(order)], torch.from_numpy(np.stack(targets).astype(kinds.pop()))


def leave_out(error: BadImage) -> None:
    """Warn that a pair does not take part."""
    warnings.warn(f"left out of the evaluation: {error}", stacklevel=3)


def _central(values: NDArray[Any], size: int) -> NDArray[Any]:
    """Return the values at the pixels of ``prepare(image, size, size)``, by the nearest one."""
    height, width = values.shape
    scale = size / min(height, width)
    rows, columns = max(size, int(height * scale)), max(size, int(width * scale))
    top, left = round((rows - size) / 2), round((columns - size) / 2)
    y = ((np.arange(size) + top + 0.5) * height / rows).astype(int)
    x = ((np.arange(size) + left + 0.5) * width / columns).astype(int)
    return values[np.minimum(y, height - 1)[:, None], np.minimum(x, width - 1)]


def warm(step: int, warmup: int, start: float) -> float:
    """Return the factor of a linear warm-up from ``start`` to 1 over ``warmup`` steps."""
    return 1.0 if step >= warmup else 1.0 - (1.0 - start) * (1.0 - step / warmup)


class Samples(Dataset[Any]):
    """A rank's share of each step's training samples, the same for every number of ranks.

    Args:
        count: pairs to draw from. make: a sample from (pair, a generator for this place of this step).
        void: what fills the targets of places without a sample.
    """

    def __init__(
        self,
        count: int,
        make: Callable[[int, np.random.Generator], Sample],
        batch: int,
        seed: int,
        rank: int,
        world_size: int,
        void: float,
    ) -> None:
        self.pairs, self.make, self.batch, self.seed, self.void = count, make, batch, seed, void
        self.share = -(-batch // world_size)
        self.first = min(rank * self.share, batch)
        self.count = max(0, min(self.share, batch - self.first))
        self.stream = Stream(seed, count, batch)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, int]:
        """Return images (share, 3, H, W), targets (share, H, W), and how many of them, from the first on, are samples.

        Places behind those are filled, since all ranks must call a sharded backbone equally often.
        """
        samples = []
        for place in range(self.first, self.first + max(1, self.count)):
            index = int(self.stream.samples(step, min(place, self.batch - 1), 1)[0])
            samples.append(self._sample(index, step, place))
        images = np.stack([image for image, _ in samples])
        targets = np.stack([target for _, target in samples])
        missing = self.share - len(samples)
        if missing or not self.count:
            images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)])
            targets = np.concatenate([targets, np.full((missing, *targets.shape[1:]), self.void, targets.dtype)])
        targets[self.count :] = self.void
        return torch.from_numpy(images), torch.from_numpy(targets), self.count

    def _sample(self, index: int, step: int, place: int) -> Sample:
        """Return a sample of a pair, or of the next one at random where that cannot be read."""
        others = generator(self.seed, "pair instead of another", step, place)
        for _ in range(_OTHERS):
            try:
                return self.make(index, generator(self.seed, "dense sample", step, place))
            except BadImage as error:
                leave_out(error)
                complaint, index = error, int(others.integers(self.pairs))
        raise UserError(f"{_OTHERS} training pairs in a row cannot be read, the last is {complaint}")


def train_head(
    head: LinearHead,
    samples: Samples | KeptSamples,
    loss: Callable[[Tensor, Tensor, int, int], Tensor],
    rate: Callable[[int], float],
    optimizer: torch.optim.Optimizer,
    steps: int,
    world: World,
    *,
    workers: int = 0,
    title: str = "",
    kept: Path | None = None,
) -> None:
    """Train a head; all ranks take the same steps.

    Args:
        loss: of (images, targets, number that counts, step) on this rank; losses of all ranks add up to the step's.
        rate: learning rate of a step.
        kept: file that a training which was interrupted goes on from.
    """
    resumption = Resumption(kept, head, optimizer, world)
    start = resumption.load()
    loader: DataLoader[Any] = DataLoader(samples, batch_size=None, sampler=range(start, steps), num_workers=workers)
    parameters = [p for p in head.parameters() if p.requires_grad]
    head.train()
    with progress_bar(title if world.rank == 0 else "", steps, start, "steps") as advance:
        for step, (images, targets, count) in enumerate(loader, start):
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            optimizer.zero_grad()
            loss(images.to(world.device), targets.to(world.device), int(count), step).backward()
            if world.size > 1:
                flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
                dist.all_reduce(flat)
                parts = flat.split([p.numel() for p in parameters])
                for parameter, part in zip(parameters, parts, strict=True):
                    parameter.grad = part.view_as(parameter)
            optimizer.step()
            resumption.save(step + 1, now=step + 1 == steps)
            advance(1)
    head.eval()


def windows(height: int, width: int, crop: int, stride: int) -> list[tuple[int, int, int, int]]:
    """Return (top, left, bottom, right) of windows of ``crop`` pixels that cover an image, ``stride`` apart.

    The last ones of a row and a column are moved inwards to stay inside; a side shorter than the crop is taken whole.
    """

    def starts(length: int) -> list[int]:
        if length <= crop:
            return [0]
        count = math.ceil((length - crop) / stride) + 1
        return [min(number * stride, length - crop) for number in range(count)]

    return [(y, x, min(y + crop, height), min(x + crop, width)) for y in starts(height) for x in starts(width)]


def short_side_size(height: int, width: int, short: float, longest: float = math.inf) -> tuple[int, int]:
    """Return (height, width) scaled so that the shorter side is ``short``, or less if the longer one would exceed."""
    scale = min(short / min(height, width), longest / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def own_share(count: int, rank: int, world_size: int) -> Iterator[int | None]:
    """Yield this rank's share of ``range(count)``, every ``world_size``-th; None where others still have one."""
    for start in range(0, count, world_size):
        index = start + rank
        yield index if index < count else None


def colours(count: int) -> NDArray[np.uint8]:
    """Return ``count`` distinct colours (count, 3) for the classes of pictures."""
    numbers = np.arange(count)
    hue, light = (numbers * 0.618034) % 1.0, 0.95 - 0.35 * (numbers % 3) / 2
    hsv = np.stack([hue * 255, np.full(count, 165), light * 255], axis=1).astype(np.uint8)
    return np.asarray(Image.fromarray(hsv[None], "HSV").convert("RGB"))[0]


def tile(rows: Sequence[Sequence[NDArray[np.uint8]]], height: int = 180, gap: int = 4) -> Image.Image:
    """Return pictures (H, W, 3) in rows and columns, each scaled to ``height`` pixels."""
    scaled = [
        [Image.fromarray(p).resize((max(1, round(p.shape[1] * height / p.shape[0])), height)) for p in row]
        for row in rows
    ]
    width = max(sum(picture.width + gap for picture in row) - gap for row in scaled)
    canvas = Image.new("RGB", (width, len(scaled) * (height + gap) - gap), "white")
    for number, row in enumerate(scaled):
        left = 0
        for picture in row:
            canvas.paste(picture, (left, number * (height + gap)))
            left += picture.width + gap
    return canvas
