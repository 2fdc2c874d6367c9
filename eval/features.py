"""Frozen features of labelled images, sharded over ranks: what every evaluation starts from."""

from __future__ import annotations

import hashlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dinov2_fsdp.data.batch import IMAGE_MEAN, IMAGE_STD
from dinov2_fsdp.data.sources import BadImage, Source
from dinov2_fsdp.errors import UserError
from dinov2_fsdp.parallel.place import check_devices
from dinov2_fsdp.rng import generator
from eval.rows import BAD, KEPT, Rows, RowsOnDisk

Features = Callable[[Tensor], dict[str, Tensor]]
"""A frozen forward: normalised images (B, 3, H, W) to the backbone's dictionary of outputs."""

BLOCKS = "x_norm_blocks"
"""Where :func:`frozen` puts the normalised tokens (B, tokens, D) of each block that it was asked for."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

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


def class_tokens_and_mean(outputs: dict[str, Tensor]) -> Tensor:
    """Return each asked-for block's class token, lowest block first, then the last block's mean patch: (B, (n + 1)·D).

    Every input of the published linear probe is a slice of this row: the last n class tokens, with or without the mean.
    """
    blocks = outputs.get(BLOCKS)
    tokens = [outputs["x_norm_clstoken"]] if blocks is None else [block[:, 0] for block in blocks]
    return torch.cat([*tokens, outputs["x_norm_patchtokens"].mean(dim=1)], dim=1)


def patch_grid(outputs: dict[str, Tensor], rows: int, columns: int) -> Tensor:
    """Return the patch tokens of the asked-for blocks (by default the last), concatenated: (B, n·D, rows, columns)."""
    blocks = outputs.get(BLOCKS)
    tokens = [outputs["x_norm_patchtokens"]] if blocks is None else [block[:, -rows * columns :] for block in blocks]
    return torch.cat(tokens, dim=2).transpose(1, 2).unflatten(2, (rows, columns))


def frozen(
    model: nn.Module, size: int, device: torch.device, *, precision: str = "fp32", blocks: Sequence[int] = ()
) -> Features:
    """Return the forward of a whole (unsharded) backbone on ``device`` for crops of ``size`` pixels.

    Args:
        size: pixels; 0 leaves the size to the caller.
        precision: of the forward, by autocast: fp32, bf16 or fp16. What it returns is used in fp32.
        blocks: numbers of blocks whose tokens, through the final norm, are wanted too; -1 is the last.

    Raises:
        UserError: the patch does not divide the size, or there are fewer blocks.
    """
    patch = int(model.patch_size)  # type: ignore[arg-type]
    if size % patch:
        low = max(patch, size // patch * patch)
        raise UserError(
            f"size {size} is no multiple of this backbone's patch of {patch}; use e.g. {low} or {low + patch}"
        )
    model = model.to(device).eval()
    forward: Features = model.forward_features  # type: ignore[assignment]
    if blocks:
        depth = len(model.blocks)  # type: ignore[arg-type]
        if any(not -depth <= block < depth for block in blocks):
            raise UserError(f"blocks {[*blocks]} are wanted, but this backbone has {depth}; valid: -{depth} … -1")
        numbers = [block % depth for block in blocks]
        forward = forward if numbers == [depth - 1] else _with_blocks(model, numbers)
    if precision == "fp32":
        return forward

    def autocast(images: Tensor) -> dict[str, Tensor]:
        with torch.autocast(device.type, PRECISIONS[precision]):
            return forward(images)

    return autocast


def _with_blocks(model: nn.Module, blocks: list[int]) -> Features:
    modules: Any = model.blocks

    def forward(images: Tensor) -> dict[str, Tensor]:
        caught: dict[int, Tensor] = {}
        handles = [
            modules[block].register_forward_hook(
                lambda _module, _inputs, output, block=block: caught.__setitem__(block, output)
            )
            for block in set(blocks)
        ]
        try:
            outputs = model.forward_features(images)  # type: ignore[operator]
        finally:
            for handle in handles:
                handle.remove()
        tokens = [model.norm(caught[block]).unflatten(0, (len(images), -1)) for block in blocks]  # type: ignore[operator]
        return {**outputs, BLOCKS: tokens}

    return forward


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
    mean = torch.tensor(IMAGE_MEAN, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(IMAGE_STD, device=images.device).view(1, 3, 1, 1)
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
    chosen: NDArray[np.int64] | None = None,
    progress: str = "",
    pick: Callable[[dict[str, Tensor]], Tensor] = class_token,
    partial: Path | None = None,
    key: dict[str, Any] | None = None,
) -> Extracted:
    """Return this rank's share of ``source``: image ``i`` of the chosen ones belongs to rank ``i`` mod ``world_size``.

    Every rank calls ``features`` equally often with batches of equal size, since a sharded model's forward is
    collective; places without an image of their own are filled with black ones, whose results are dropped.

    Args:
        resize, size: pixels of the shorter side and of the central crop.
        chosen: indices of the images, rising; by default :func:`subset` of ``max_images``.
        progress: title of a progress line on stderr, shown by rank 0 (empty: none).
        pick: which of the outputs to keep, (B, …).
        partial: folder for rows that are done. They are then kept there instead of in memory, and an interrupted
            extraction goes on from them. The caller removes it in the end.
        key: what else, beside the images, the rows in ``partial`` depend on (the checkpoint, the picked outputs).

    Raises:
        UserError: the source has no labels.
    """
    if source.labels is None:
        raise UserError(f"'{source.spec}' has no labels, which an evaluation needs; use one with a folder per class")
    chosen = subset(source, max_images) if chosen is None else chosen
    per_rank = -(-len(chosen) // world_size)
    share = np.full(per_rank, _PADDING, np.int64)
    own = chosen[rank::world_size]
    share[: len(own)] = own
    store, done = Rows(per_rank), 0
    if partial is not None:
        images = {"images": source.fingerprint, "chosen": _digest(share), "resize": resize, "size": size}
        store = RowsOnDisk(per_rank, partial / f"rank_{rank}_of_{world_size}", {**images, **(key or {})})
        # Ranks whose forwards are collective have to go on from the same batch.
        done = _least(store.done() // batch * batch, world_size, device)
    loader: DataLoader[Any] = DataLoader(
        _Images(source, share[done:], resize, size), batch_size=batch, num_workers=workers, collate_fn=_collate
    )

    lost = share[:done][store.state[:done] == BAD]
    bad = [f"{source.name(int(index))}: cannot be read" for index in lost if index != _PADDING]
    # Not inference_mode: a sharded model would keep gathered weights that cannot take part in training any more.
    with torch.no_grad(), progress_bar(progress if rank == 0 else "", per_rank, done) as advance:
        for pixels, ok, complaints in loader:
            rows = pick(features(normalise(pixels.to(device, non_blocking=True)))).float()
            store.write(done, rows.cpu(), np.where(ok, KEPT, BAD).astype(np.uint8))
            bad += complaints
            done += len(ok)
            advance(len(ok))
    store.save()
    for complaint in bad:
        warnings.warn(f"left out of the evaluation: {complaint}", stacklevel=2)
    kept = store.state == KEPT
    rows = torch.empty(0, 0) if store.rows is None else store.rows
    indices = share[kept]
    return Extracted(
        features=rows if kept.all() else rows[torch.from_numpy(kept)],
        labels=torch.from_numpy(np.asarray(source.labels, np.int64)[indices]),
        indices=torch.from_numpy(indices),
        bad=bad,
    )


all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Newer torch warns of the older name, on every rank; torch 2.11 has no other."""


def gather_rows(rows: Tensor, world_size: int, device: torch.device) -> Tensor:
    """Return the rows of all ranks, rank after rank, on the CPU; ranks may hold different numbers of them."""
    if world_size == 1:
        return rows
    counts = torch.zeros(world_size, dtype=torch.int64, device=device)
    all_gather_single(counts, torch.tensor([len(rows)], device=device))
    widest = int(counts.max())
    mine = torch.zeros(widest, *rows.shape[1:], dtype=rows.dtype, device=device)
    mine[: len(rows)] = rows.to(device)
    everyone = mine.new_empty(world_size * widest, *rows.shape[1:])
    all_gather_single(everyone, mine)
    parts = everyone.cpu().split(widest) if widest else [rows.cpu()] * world_size
    return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])


def in_order(extracted: Extracted, world_size: int, device: torch.device) -> Extracted:
    """Return all ranks' rows in the order of the images, the same on every rank."""
    indices = gather_rows(extracted.indices, world_size, device)
    order = indices.argsort()
    return Extracted(
        gather_rows(extracted.features, world_size, device)[order] if world_size > 1 else extracted.features,
        gather_rows(extracted.labels, world_size, device)[order],
        indices[order],
        extracted.bad,
    )


def reduce_over_ranks(values: Tensor, world_size: int, device: torch.device, how: dist.ReduceOp.RedOpType) -> Tensor:
    """Return ``values`` reduced over all ranks, on the CPU."""
    if world_size == 1:
        return values
    moved = values.to(device)
    dist.all_reduce(moved, op=how)
    return moved.cpu()


class NotFinite(UserError):
    """Features that are no finite numbers: the run diverged."""


def not_finite(extracted: Extracted) -> int:
    """Return how many rows hold a number that is not finite."""
    # In parts, since the rows may be a file larger than the memory.
    return sum(int((~part.isfinite().flatten(1).all(dim=1)).sum()) for part in extracted.features.split(8192))


def check_finite(parts: Sequence[Extracted], world_size: int, device: torch.device) -> None:
    """Refuse features of any rank that are not finite. Raises :class:`NotFinite` on all ranks."""
    counts = torch.tensor([sum(map(not_finite, parts)), sum(len(part.features) for part in parts)])
    broken, total = reduce_over_ranks(counts, world_size, device, dist.ReduceOp.SUM).tolist()
    if broken:
        raise NotFinite(
            f"the features of {broken} of {total} images are not finite: the run diverged; use an earlier --step"
        )


def _least(number: int, world_size: int, device: torch.device) -> int:
    if world_size == 1:
        return number
    least = torch.tensor(number, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least)


def _digest(indices: NDArray[np.int64]) -> str:
    return hashlib.blake2b(indices.tobytes(), digest_size=12).hexdigest()


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
def progress_bar(title: str, total: int, done: int = 0, unit: str = "images") -> Iterator[Callable[[int], None]]:
    """Yield a function that adds to the count: a bar on a terminal, otherwise a line every ten seconds.

    Nothing is shown without a title. ``done``: how much of the total was there before.
    """
    if not title:
        yield lambda count: None
        return
    console = Console(file=sys.stderr)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bars:
            task = bars.add_task(title, total=total, completed=done)
            yield lambda count: bars.advance(task, count)
        return
    start = last = time.monotonic()
    reached = done

    def advance(count: int) -> None:
        nonlocal reached, last
        reached += count
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            speed = (reached - done) / (now - start)
            print(f"{title}: {reached}/{total} ({speed:.3g} {unit}/s)", file=sys.stderr, flush=True)

    yield advance
