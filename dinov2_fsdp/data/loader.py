"""From a source to microbatches on the training process: read, crop, mask, stack."""

from __future__ import annotations

import atexit
import functools
import gc
import itertools
import multiprocessing
import os
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, get_worker_info

from dinov2_fsdp.config import Config
from dinov2_fsdp.data.augment import CropParameters, MultiCrop, multi_crop
from dinov2_fsdp.data.batch import Microbatch
from dinov2_fsdp.data.device_colours import ColourPlan, plan_colours
from dinov2_fsdp.data.masks import masks_for
from dinov2_fsdp.data.sources import BadImage, Source
from dinov2_fsdp.data.sources.decoding import LazyImage
from dinov2_fsdp.data.stream import Stream
from dinov2_fsdp.errors import RunFailed, UserError
from dinov2_fsdp.memory import keep_freed_memory
from dinov2_fsdp.rng import generator
from dinov2_fsdp.signals import leave_signals_to_parent

REPLACEMENTS_PER_IMAGE = 20
"""Tries to replace one unreadable image before the data set counts as broken."""

OPENED_BYTES = 2**22
"""So much of encoded images is opened before the first of them is decoded."""

WAIT = 0.01
"""Seconds between two looks of a worker that has to wait for its turn."""

DYING = 2.0
"""Seconds within which a worker is seen to be dead after a connection to it broke."""

_WORKER = "DataLoader worker"
"""How torch's messages about a worker's end begin."""


def build_crops(config: Config) -> MultiCrop:
    """Return the multi-crop augmentation that a config describes, as far as data workers apply it."""
    crops = config.crops
    kind = MultiCrop
    if crops.implementation == "fast":
        try:
            from dinov2_fsdp.data.fast_augment import FastMultiCrop, UncolouredMultiCrop

            kind = UncolouredMultiCrop if crops.colours == "device" else FastMultiCrop
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


_Opened = tuple[LazyImage, list[CropParameters]]


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
        drawn: list[list[CropParameters]] = []
        for i, found in enumerate(self._opened(samples.tolist(), step, first)):
            own = global_crops[:, i], local_crops[:, i]
            samples[i], parameters = self._crop(int(samples[i]), found, step, first + i, bad, *own)
            drawn.append(parameters)
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
            **self._colours(drawn),
        )

    def _colours(self, drawn: Sequence[Sequence[CropParameters]]) -> dict[str, ColourPlan]:
        """Return what the workers leave to the device, of what was ``drawn`` for the crops of each image."""
        if self.config.crops.colours == "worker":
            return {}
        crop_major = list(zip(*drawn, strict=True))
        return {
            "global_colours": plan_colours([*itertools.chain(*crop_major[:2])]),
            "local_colours": plan_colours([*itertools.chain(*crop_major[2:])]),
        }

    def _opened(self, samples: list[int], step: int, first: int) -> Iterator[_Opened | BadImage]:
        """Open images, several before the first is handed on.

        If each were decoded at once, decoding would push the code that opens out of the processor's caches, and
        opening would take twice as long.
        """
        waiting: deque[_Opened | BadImage] = deque()
        held = 0
        for place, sample in enumerate(samples, first):
            waiting.append(found := self._open(sample, step, place))
            held += 0 if isinstance(found, BadImage) else found[0].nbytes
            if held >= OPENED_BYTES:
                held = 0
                while waiting:
                    yield waiting.popleft()
        while waiting:
            yield waiting.popleft()

    def _open(self, sample: int, step: int, place: int) -> _Opened | BadImage:
        """Return an image and what is drawn for it, or why there is none."""
        try:
            image = self.source.lazy_image(sample)
        except BadImage as error:
            return error
        return image, self.crops.draw(image.width, image.height, generator(self.config.seed, "augment", step, place))

    def _crop(
        self,
        sample: int,
        found: _Opened | BadImage,
        step: int,
        place: int,
        bad: list[tuple[str, str]],
        global_crops: NDArray[np.uint8],
        local_crops: NDArray[np.uint8],
    ) -> tuple[int, list[CropParameters]]:
        """Write an image's crops, or those of the one that replaces it; return which it is and what was drawn."""
        for attempt in range(REPLACEMENTS_PER_IMAGE):
            try:
                if isinstance(found, BadImage):
                    raise found
                self.crops.fill(*found, global_crops, local_crops)
                return sample, found[1]
            except BadImage as error:
                bad.append((error.name, error.reason))
                sample = self.stream.replacement(step, place, attempt)
                found = self._open(sample, step, place)
        names = ", ".join(name for name, _ in bad[-3:])
        raise RunFailed(
            f"{REPLACEMENTS_PER_IMAGE} images in a row cannot be read (step {step + 1}); has the data gone? The last: "
            f"{names} ({bad[-1][1]})"
        )


@dataclass(frozen=True)
class _Places:
    """The places of one rank's microbatches, (step, number within the step), from ``start`` to ``end``, in order."""

    start: int
    end: int
    rank: int
    per_rank: int

    def __len__(self) -> int:
        return (self.end - self.start) * self.per_rank

    def __getitem__(self, number: int) -> tuple[int, int]:
        steps, index = divmod(number, self.per_rank)
        return self.start + steps, self.rank * self.per_rank + index


@dataclass(frozen=True)
class _Failure:
    """What a worker hands over instead of a microbatch, so that it is raised in the microbatch's place."""

    text: str
    expected: bool


class _NextInLine(Dataset["tuple[int, Microbatch | _Failure]"]):
    """One more microbatch for whoever asks, with its number: the first of all that no process has taken yet.

    torch deals items out before it is known who is fast, and those dealt to a slow worker wait for it. So what torch
    deals here says "one more" and not which; a slow worker then holds up only what it is working at.

    Args:
        ahead: microbatches that may be in the making or in memory; whoever would take one beyond them waits.
    """

    def __init__(self, microbatches: Microbatches, places: _Places, ahead: int) -> None:
        self.microbatches, self.places, self.ahead = microbatches, places, ahead
        self.taken = multiprocessing.Value("q", 0)
        self.handed_over = multiprocessing.RawValue("q", 0)

    def __getitem__(self, _: int) -> tuple[int, Microbatch | _Failure]:
        parent = os.getppid()
        with self.taken.get_lock():
            number = self.taken.value
            self.taken.value += 1
        while number >= self.handed_over.value + self.ahead and os.getppid() == parent:
            time.sleep(WAIT)
        if number < self.handed_over.value:
            return number, _Failure("nobody wants any more", expected=True)
        try:
            return number, self.microbatches[self.places[number]]
        except RunFailed as error:
            return number, _Failure(str(error), expected=True)
        except Exception as error:
            if get_worker_info() is None:
                raise
            text = f"a data worker failed: {type(error).__name__}: {error}\n{traceback.format_exc()}"
            return number, _Failure(text, expected=False)


class Loader(Iterator[Microbatch]):
    """An iterator over a rank's microbatches, in order, whichever worker is done first.

    Raises:
        RunFailed: (when asked for the next) the data cannot be read any more, or a worker process died.
    """

    def __init__(self, line: _NextInLine, loader: DataLoader[Any]) -> None:
        self._line = line
        self._items: list[Any] = []
        # Python ends what is left of its children by a signal that workers ignore, and would wait for them for ever.
        self._end = functools.partial(_end_workers, line, self._items)
        atexit.register(self._end)
        self._items.append(iter(loader))
        self._early: dict[int, Microbatch | _Failure] = {}
        self._number = 0

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Microbatch:
        while self._number not in self._early:
            number, item = self._receive()
            self._early[number] = item
        item = self._early.pop(self._number)
        self._number += 1
        self._line.handed_over.value = self._number
        if isinstance(item, _Failure):
            raise RunFailed(item.text) if item.expected else RuntimeError(item.text)
        return item

    def _receive(self) -> tuple[int, Microbatch | _Failure]:
        try:
            return next(self._items[0])
        except (RuntimeError, EOFError, OSError) as error:
            if (death := _death(error, getattr(self._items[0], "_workers", ()))) is None:
                raise
            raise RunFailed(f"a data worker died: {death}") from error

    def __del__(self) -> None:
        atexit.unregister(self._end)
        self._end()


def _death(error: Exception, workers: Sequence[Any]) -> str | None:
    """Return which worker's death an error comes from, or None if none of them has died."""
    deadline = time.monotonic() + DYING
    try:
        # What a worker has made is fetched over a connection to it, which breaks before the worker counts as dead.
        while _WORKER not in str(error) and workers and time.monotonic() < deadline:
            for worker in workers:
                if not worker.is_alive():
                    return f"{_WORKER} (pid {worker.pid}) ended with exit code {worker.exitcode}"
            time.sleep(WAIT)
    except RuntimeError as said_by_signal:
        error = said_by_signal
    return str(error).splitlines()[0] if _WORKER in str(error) else None


def _end_workers(line: _NextInLine, items: list[Any]) -> None:
    # A worker that waits for its turn would not hear that nobody wants any more.
    line.handed_over.value = len(line.places)
    while items:
        # Not left to its end: the traceback of an exception may hold it. Without workers it has no such method.
        iterator = items.pop()
        getattr(iterator, "_shutdown_workers", lambda: None)()
        for worker in getattr(iterator, "_workers", ()):
            # One that hangs, or waits for a lock that a killed one held, ignores what torch sends it.
            if worker.is_alive():
                worker.kill()
                worker.join(DYING)


def build_loader(config: Config, source: Source, start: int, end: int, rank: int, per_rank: int, pin: bool) -> Loader:
    """Return an iterator over a rank's microbatches of steps ``start … end − 1``, ``per_rank`` for each step.

    ``pin``: put them into pinned memory, from which copies to a GPU overlap with work.
    """
    workers, prefetch = config.data.workers, config.data.prefetch
    line = _NextInLine(Microbatches(config, source), _Places(start, end, rank, per_rank), max(1, workers * prefetch))
    loader: DataLoader[Any] = DataLoader(
        line,
        batch_size=None,
        sampler=range(len(line.places)),
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        persistent_workers=False,
        pin_memory=pin,
        worker_init_fn=_start_worker if workers else None,
        in_order=False,
    )
    return Loader(line, loader)


def prepare_worker() -> None:
    """Make ready a process that turns images into crops over and over: the same pages, and no search of what stays.

    What is there before the first image, hundreds of thousands of objects of libraries' and the parent's, would be
    looked through for garbage again and again, and memory shared with the parent be copied by that.
    """
    keep_freed_memory()
    gc.freeze()


def _start_worker(_: int) -> None:
    leave_signals_to_parent()
    prepare_worker()
