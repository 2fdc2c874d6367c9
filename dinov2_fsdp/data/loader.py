"""From a source to microbatches on the training process: read, crop, mask, stack."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from dinov2_fsdp.config import Config
from dinov2_fsdp.data.augment import MultiCrop, multi_crop
from dinov2_fsdp.data.batch import Microbatch
from dinov2_fsdp.data.masks import masks_for
from dinov2_fsdp.data.sources import BadImage, Source
from dinov2_fsdp.data.stream import Stream
from dinov2_fsdp.errors import RunFailed, UserError
from dinov2_fsdp.rng import generator
from dinov2_fsdp.signals import leave_signals_to_parent

REPLACEMENTS_PER_IMAGE = 20
"""Tries to replace one unreadable image before the data set counts as broken."""


def build_crops(config: Config) -> MultiCrop:
    """Return the multi-crop augmentation that a config describes."""
    crops = config.crops
    kind = MultiCrop
    if crops.implementation == "fast":
        try:
            from dinov2_fsdp.data.fast_augment import FastMultiCrop as kind
        except ImportError as error:
            raise UserError(
                f"crops.implementation=fast needs OpenCV, which cannot be imported ({error})\n"
                "  install opencv-python-headless, or choose crops.implementation=reference"
            ) from error
    return multi_crop(
        global_size=crops.global_size,
        global_scale=crops.global_scale,
        local_size=crops.local_size,
        local_scale=crops.local_scale,
        n_local=crops.local_number,
        blur=crops.blur,
        flip_p=crops.flip,
        jitter_p=crops.jitter,
        color_jitter=crops.jitter_strength,
        gray_p=crops.gray,
        solarize_p=crops.solarize,
        kind=kind,
    )


class Microbatches(Dataset[Microbatch]):
    """Random access to microbatches by (step, number of the microbatch within the step).

    An item is a pure function of the seed, the two numbers and the data: no worker, rank or history enters it.
    """

    def __init__(self, config: Config, source: Source) -> None:
        self.config, self.source = config, source
        self.stream = Stream(config.seed, len(source), config.train.batch)
        self.crops = build_crops(config)
        self.grid = (config.crops.global_size // config.model.patch,) * 2

    def __getitem__(self, place: tuple[int, int]) -> Microbatch:
        step, index = place
        size, seed = self.config.train.microbatch, self.config.seed
        first = index * size
        samples = self.stream.samples(step, first, size)
        bad: list[tuple[str, str]] = []
        crops = self.config.crops
        # Crop-major, and each image writes into its own place: nothing is stacked or transposed afterwards.
        global_crops = np.empty((2, size, 3, crops.global_size, crops.global_size), np.uint8)
        local_crops = np.empty((crops.local_number, size, 3, crops.local_size, crops.local_size), np.uint8)
        for i in range(size):
            samples[i] = self._crop(int(samples[i]), step, first + i, bad, global_crops[:, i], local_crops[:, i])
        probability = self.config.masks.probability if self.config.loss.ibot > 0 else 0.0
        places = range(first, first + size)
        masks = masks_for(seed, step, places, self.config.train.batch, self.grid, probability, self.config.masks.ratio)
        masks = masks.reshape(2 * size, -1)
        crop, _ = np.nonzero(masks)
        weights = (1 / np.maximum(masks.sum(axis=1), 1))[crop]
        return Microbatch(
            step=step,
            index=index,
            global_crops=torch.from_numpy(global_crops).flatten(0, 1),
            local_crops=torch.from_numpy(local_crops).flatten(0, 1),
            masks=torch.from_numpy(masks),
            masked_patches=torch.from_numpy(np.flatnonzero(masks)),
            mask_weights=torch.from_numpy(weights.astype(np.float32)),
            samples=torch.from_numpy(samples),
            bad=tuple(bad),
        )

    def _crop(
        self,
        sample: int,
        step: int,
        place: int,
        bad: list[tuple[str, str]],
        global_crops: NDArray[np.uint8],
        local_crops: NDArray[np.uint8],
    ) -> int:
        """Write an image's crops, or those of the one that replaces it; return which of the data set's it is."""
        for attempt in range(REPLACEMENTS_PER_IMAGE):
            try:
                rng = generator(self.config.seed, "augment", step, place)
                self.crops.fill(self.source.lazy_image(sample), rng, global_crops, local_crops)
                return sample
            except BadImage as error:
                bad.append((error.name, error.reason))
                sample = self.stream.replacement(step, place, attempt)
        names = ", ".join(name for name, _ in bad[-3:])
        raise RunFailed(
            f"{REPLACEMENTS_PER_IMAGE} images in a row cannot be read (step {step + 1}); has the data gone? The last: "
            f"{names} ({bad[-1][1]})"
        )


class _Places(Sampler[tuple[int, int]]):
    """The places of one rank's microbatches, from ``start`` to ``end``, in order."""

    def __init__(self, start: int, end: int, rank: int, per_rank: int) -> None:
        self.start, self.end, self.rank, self.per_rank = start, end, rank, per_rank

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for step in range(self.start, self.end):
            for number in range(self.per_rank):
                yield step, self.rank * self.per_rank + number

    def __len__(self) -> int:
        return (self.end - self.start) * self.per_rank


@dataclass(frozen=True)
class _Failure:
    """What a worker hands over instead of a microbatch: as an exception it would lose all but its text."""

    text: str


class _Guarded(Dataset["Microbatch | _Failure"]):
    def __init__(self, microbatches: Microbatches) -> None:
        self.microbatches = microbatches

    def __getitem__(self, place: tuple[int, int]) -> Microbatch | _Failure:
        try:
            return self.microbatches[place]
        except RunFailed as error:
            return _Failure(str(error))


class Loader(Iterator[Microbatch]):
    """An iterator over a rank's microbatches, in order.

    Raises:
        RunFailed: (when asked for the next) the data cannot be read any more, or a worker process died.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._items = iter(loader)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Microbatch:
        try:
            item = next(self._items)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RunFailed(f"a data worker died: {str(error).splitlines()[0]}") from error
        if isinstance(item, _Failure):
            raise RunFailed(item.text)
        return item


def build_loader(config: Config, source: Source, start: int, end: int, rank: int, per_rank: int, pin: bool) -> Loader:
    """Return an iterator over a rank's microbatches of steps ``start … end − 1``, ``per_rank`` for each step.

    ``pin``: put them into pinned memory, from which copies to a GPU overlap with work.
    """
    workers = config.data.workers
    loader: DataLoader[Any] = DataLoader(
        _Guarded(Microbatches(config, source)),
        batch_size=None,
        sampler=_Places(start, end, rank, per_rank),
        num_workers=workers,
        prefetch_factor=config.data.prefetch if workers else None,
        persistent_workers=False,
        pin_memory=pin,
        worker_init_fn=_quiet_worker if workers else None,
    )
    return Loader(loader)


def _quiet_worker(_: int) -> None:
    leave_signals_to_parent()
