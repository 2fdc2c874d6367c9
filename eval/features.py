"""Frozen features of labelled images, sharded over ranks: what every evaluation starts from."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dinov2_fsdp.data.sources import BadImage, Source
from dinov2_fsdp.errors import UserError
from dinov2_fsdp.parallel.place import check_devices
from dinov2_fsdp.rng import generator

Features = Callable[[Tensor], dict[str, Tensor]]
"""A frozen forward: normalised images (B, 3, H, W) to the backbone's dictionary of outputs."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_PADDING = -1
_SECONDS_BETWEEN_LINES = 10.0


@dataclass
class Extracted:
    """One rank's share of a data set, on the CPU: ``features`` (n, D) fp32, ``labels`` (n,), ``indices`` (n,).

    Row order follows ``indices``, which rise. Unreadable images have no row; their names are in ``bad``.
    """

    features: Tensor
    labels: Tensor
    indices: Tensor
    bad: list[str]


def class_token(outputs: dict[str, Tensor]) -> Tensor:
    """Return the normalised class token (B, D) of a forward's outputs."""
    return outputs["x_norm_clstoken"]


def pixel_features(images: Tensor) -> dict[str, Tensor]:
    """Return all pixels (B, 3·H·W), ImageNet-normalised, in the place of a class token: the baseline to beat."""
    return {"x_norm_clstoken": images.flatten(1)}


def frozen(model: nn.Module, size: int, device: torch.device) -> Features:
    """Return the forward of a whole (unsharded) backbone on ``device`` for crops of ``size`` pixels.

    Raises:
        UserError: the patch does not divide the size.
    """
    patch = int(model.patch_size)  # type: ignore[arg-type]
    if size % patch:
        low = max(patch, size // patch * patch)
        raise UserError(
            f"size {size} is no multiple of this backbone's patch of {patch}; use e.g. {low} or {low + patch}"
        )
    model = model.to(device).eval()
    return model.forward_features  # type: ignore[return-value]


def choose_device(name: str) -> torch.device:
    """Return the device of ``auto`` (a GPU where there is one), ``cpu`` or ``cuda``.

    Raises:
        UserError: ``cuda`` is asked for where there is none.
    """
    return torch.device(check_devices(name, 1, torch.cuda.device_count()))


def prepare(image: Image.Image, resize: int, size: int) -> NDArray[np.uint8]:
    """Return the central ``size`` × ``size`` pixels (H, W, 3) after the shorter side became ``resize`` (bicubic)."""
    width, height = image.size
    scale = resize / min(width, height)
    if scale != 1.0:
        width, height = max(resize, int(width * scale)), max(resize, int(height * scale))
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def normalise(images: Tensor) -> Tensor:
    """Return uint8 images (B, H, W, 3) as float images (B, 3, H, W) with ImageNet's mean and deviation taken out."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=images.device).view(1, 3, 1, 1)
    return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std


def subset(source: Source, max_images: int, seed: int = 0) -> NDArray[np.int64]:
    """Return rising indices of at most ``max_images`` images (0: all), random but spread evenly over the classes."""
    total = len(source)
    if max_images <= 0 or max_images >= total:
        return np.arange(total)
    order = generator(seed, "evaluation subset").permutation(total)
    if source.labels is not None:
        order = order[np.argsort(np.asarray(source.labels)[order], kind="stable")]
    places = np.arange(max_images) * total // max_images
    return np.sort(order[places]).astype(np.int64)


def extract(
    features: Features,
    source: Source,
    *,
    resize: int,
    size: int,
    batch: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    max_images: int = 0,
    progress: str = "",
    pick: Callable[[dict[str, Tensor]], Tensor] = class_token,
) -> Extracted:
    """Return this rank's share of ``source``: image ``i`` of the chosen ones belongs to rank ``i`` mod ``world_size``.

    Every rank calls ``features`` equally often with batches of equal size, since a sharded model's forward is
    collective; places without an image of their own are filled with black ones, whose results are dropped.

    Args:
        resize, size: pixels of the shorter side and of the central crop.
        progress: title of a progress line on stderr, shown by rank 0 (empty: none).
        pick: which of the outputs to keep, (B, D).

    Raises:
        UserError: the source has no labels.
    """
    if source.labels is None:
        raise UserError(f"'{source.spec}' has no labels, which an evaluation needs; use one with a folder per class")
    chosen = subset(source, max_images)
    per_rank = -(-len(chosen) // world_size)
    share = np.full(per_rank, _PADDING, np.int64)
    own = chosen[rank::world_size]
    share[: len(own)] = own
    loader: DataLoader[Any] = DataLoader(
        _Images(source, share, resize, size), batch_size=batch, num_workers=workers, collate_fn=_collate
    )

    rows: Tensor | None = None
    kept = np.zeros(per_rank, bool)
    bad: list[str] = []
    done = 0
    # Not inference_mode: a sharded model would keep gathered weights that cannot take part in training any more.
    with torch.no_grad(), _progress(progress if rank == 0 else "", per_rank) as advance:
        for images, ok, complaints in loader:
            tokens = pick(features(normalise(images.to(device, non_blocking=True)))).float()
            if rows is None:
                rows = torch.empty(per_rank, tokens.shape[1])
            rows[done : done + len(ok)] = tokens.cpu()
            kept[done : done + len(ok)] = ok
            bad += complaints
            done += len(ok)
            advance(len(ok))
    for complaint in bad:
        warnings.warn(f"left out of the evaluation: {complaint}", stacklevel=2)
    rows = torch.empty(0, 0) if rows is None else rows
    indices = share[kept]
    return Extracted(
        features=rows if kept.all() else rows[torch.from_numpy(kept)],
        labels=torch.from_numpy(np.asarray(source.labels, np.int64)[indices]),
        indices=torch.from_numpy(indices),
        bad=bad,
    )


class _Images(Dataset[Any]):
    def __init__(self, source: Source, indices: NDArray[np.int64], resize: int, size: int) -> None:
        self.source, self.indices, self.resize, self.size = source, indices, resize, size

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[NDArray[np.uint8], bool, str]:
        black = np.zeros((self.size, self.size, 3), np.uint8)
        index = int(self.indices[place])
        if index == _PADDING:
            return black, False, ""
        try:
            return prepare(self.source.image(index), self.resize, self.size), True, ""
        except BadImage as error:
            return black, False, str(error)


def _collate(samples: list[tuple[NDArray[np.uint8], bool, str]]) -> tuple[Tensor, list[bool], list[str]]:
    images, ok, complaints = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(images)), list(ok), [text for text in complaints if text]


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that adds to the count: a bar on a terminal, otherwise a line every ten seconds."""
    if not title:
        yield lambda count: None
        return
    console = Console(file=sys.stderr)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bars:
            task = bars.add_task(title, total=total)
            yield lambda count: bars.advance(task, count)
        return
    start = last = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            print(f"{title}: {done}/{total} ({done / (now - start):.0f} images/s)", file=sys.stderr, flush=True)

    yield advance
