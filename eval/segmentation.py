"""Semantic segmentation by a linear head on frozen patch tokens: mean IoU.

python eval/segmentation.py --weights model.safetensors --train folder:ADE#training --test folder:ADE#validation
python eval/segmentation.py --weights runs/NAME --train tar:camvid.tar#train --test tar:camvid.tar#test \\
    --classes 11 --first-class 0 --void 11 --short-side 360 --crop 352 --stride 176

DINOv2's linear protocol on ADE20K (arXiv 2304.07193, section 7.4): BatchNorm and a linear layer on the last block's
patch tokens, trained on crops, tested on sliding windows. ``--multi-scale`` is the paper's +ms: the last four blocks,
larger crops, and probabilities averaged over five sizes of the image and of its mirror image.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dinov2_fsdp.config import Config
from dinov2_fsdp.data.sources import BadImage
from dinov2_fsdp.errors import UserError, run_cli
from dinov2_fsdp.parallel.world import World
from eval import command
from eval.dense import (
    KEPT,
    Grid,
    KeptSamples,
    LinearHead,
    Sample,
    Samples,
    colours,
    grid_of,
    keep_grids,
    leave_out,
    on_pixels,
    own_share,
    short_side_size,
    tile,
    to_input,
    train_head,
    warm,
    windows,
)
from eval.features import Features, NotFinite, patch_grid, progress_bar, reduce_over_ranks
from eval.metrics import confusion_matrix, intersection_over_union, segmentation_metrics
from eval.pairs import Pairs, ScenePairs, check_pairs, open_pairs
from eval.resumption import file_of
from eval.segmentation_crops import LONGEST, SCALES, VOID, training_sample

PUBLISHED_RATIOS = (1.0, 1.32, 1.73, 2.28, 3.0)
EXAMPLES = 4


@dataclass
class Settings:
    """How the head is trained and images are cut; the defaults are the published ones for ADE20K."""

    batch: int = 16
    """Windows that go through the backbone at once in tests."""
    classes: int = 150
    """Number of classes."""
    first_class: int = 1
    """Value of the first class in the annotations; the others follow it."""
    void: tuple[int, ...] = (0,)
    """Values of pixels that do not count."""
    blocks: int = 1
    """The head reads the patch tokens of so many last blocks."""
    short_side: int = 512
    """Shorter side of test images, and of training images at factor 1, pixels."""
    longest: float = LONGEST
    """The longer side's bound, in shorter sides; 0: none."""
    scales: tuple[float, float] = SCALES
    """Smallest and largest random factor of the size of training images."""
    crop: int = 512
    """Side of training crops and of test windows, pixels."""
    stride: int = 341
    """Pixels from one test window to the next."""
    ratios: tuple[float, ...] = (1.0,)
    """Sizes of test images in multiples of short-side, over which probabilities are averaged."""
    mirror: bool = False
    """Average probabilities with those of the mirrored image."""
    multi_scale: bool = False
    """The published +ms: sets blocks 4, crop 640, stride 320, short-side 640, longest 0, scales 1 3, mirror and five
    ratios, where not given."""
    iterations: int = 40_000
    """Steps of training."""
    train_batch: int = 16
    """Crops of a step, over all processes."""
    rate: float = 1e-3
    """Learning rate of AdamW after the warm-up; it falls linearly to 0."""
    weight_decay: float = 1e-4
    """Weight decay of AdamW."""
    warmup: int = 1500
    """Steps of linear warm-up."""
    max_train: int = 0
    """Use only this many training images; 0: all."""
    max_test: int = 0
    """Use only this many test images; 0: all."""
    seed: int = 0
    """Seed of the head, the order of images and the crops."""


MULTI_SCALE: dict[str, Any] = {
    "blocks": 4, "crop": 640, "stride": 320, "short_side": 640, "longest": 0.0, "scales": (1.0, 3.0), "mirror": True,
    "ratios": PUBLISHED_RATIOS,
}  # fmt: skip


def for_scenes(pairs: ScenePairs, settings: Settings) -> Settings:
    """Return settings that suit rendered scenes: whole images at their size, a short training."""
    size = pairs.source.options.size
    return replace(
        settings, classes=pairs.classes, first_class=0, void=(), short_side=size, crop=size, stride=size,
        iterations=1000, warmup=50,
    )  # fmt: skip


def labels_of(pairs: Pairs, index: int, settings: Settings) -> NDArray[np.uint8]:
    """Return the classes (height, width) from 0 on, ``VOID`` for pixels that do not count."""
    values = pairs.target(index)
    numbers = values - settings.first_class
    void = (numbers < 0) | (numbers >= settings.classes) | np.isin(values, settings.void)
    return np.where(void, VOID, numbers).astype(np.uint8)


class Segmenter:
    """A head on a frozen backbone.

    Args:
        grid: features of images whose sides the patch divides. channels: of those.
    """

    def __init__(self, grid: Grid, patch: int, channels: int, settings: Settings, world: World) -> None:
        self.grid, self.patch, self.settings, self.world = grid, patch, settings, world
        self.head = LinearHead(channels, settings.classes, True, settings.seed, world.size).to(world.device)

    def train(self, pairs: Pairs, workers: int = 0, title: str = "", kept: Path | None = None) -> None:
        """Train the head on random crops of ``pairs``; all ranks call this. ``kept``: see :func:`train_head`."""
        s = self.settings
        count = min(s.max_train or len(pairs), len(pairs))
        samples = Samples(count, _Make(pairs, s), s.train_batch, s.seed, self.world.rank, self.world.size, VOID)
        optimizer = torch.optim.AdamW(self.head.parameters(), s.rate, weight_decay=s.weight_decay)
        train_head(
            self.head,
            samples,
            self._loss,
            self._rate,
            optimizer,
            s.iterations,
            self.world,
            workers=workers,
            title=title,
            kept=kept,
        )

    def _rate(self, step: int) -> float:
        s = self.settings
        return s.rate * (1 - step / s.iterations) * warm(step, s.warmup, 1e-6)

    def _loss(self, images: Tensor, targets: Tensor, count: int, step: int) -> Tensor:
        logits = on_pixels(images, self.patch, lambda inputs: self.head(inputs, count), self.grid)
        counted = (targets != VOID).sum()
        if self.world.size > 1:
            dist.all_reduce(counted)
        return F.cross_entropy(logits, targets, ignore_index=VOID, reduction="sum") / counted.clamp(min=1)

    def train_on_kept(self, pairs: Pairs, count: int) -> None:
        """Train the head on features of central crops that are made once; ranks share only the making."""
        s = self.settings
        grids, targets = keep_grids(
            self.grid, pairs, lambda index: labels_of(pairs, index, s), count, s.crop, s.batch, self.world, VOID
        )
        alone = replace(self.world, rank=0, size=1)
        if self.head.norm is not None:
            self.head.norm.world_size = 1

        def loss(kept: Tensor, truth: Tensor, number: int, step: int) -> Tensor:
            logits = F.interpolate(self.head(kept), size=truth.shape[1:], mode="bilinear", align_corners=False)
            known = (truth != VOID).sum().clamp(min=1)
            return F.cross_entropy(logits, truth.long(), ignore_index=VOID, reduction="sum") / known

        optimizer = torch.optim.AdamW(self.head.parameters(), s.rate, weight_decay=s.weight_decay)
        samples = KeptSamples(grids, targets, s.train_batch, s.seed)
        train_head(self.head, samples, loss, self._rate, optimizer, s.iterations, alone)

    @torch.no_grad()
    def probabilities(self, image: Image.Image) -> Tensor:
        """Return the classes' probabilities (classes, height, width), averaged over ratios and mirrored images."""
        s = self.settings
        total = torch.zeros(s.classes, image.height, image.width, device=self.world.device)
        for ratio in s.ratios:
            height, width = self._size((image.height, image.width), ratio)
            resized = image.resize((width, height), Image.Resampling.BILINEAR)
            pixels = torch.from_numpy(to_input(resized)).to(self.world.device)
            for mirrored in (False, True) if s.mirror else (False,):
                logits = self._slide(pixels.flip(-1)).flip(-1) if mirrored else self._slide(pixels)
                whole = F.interpolate(
                    logits[None], size=(image.height, image.width), mode="bilinear", align_corners=False
                )
                total += whole[0].softmax(dim=0)
        return total / (len(s.ratios) * (1 + s.mirror))

    def _slide(self, pixels: Tensor) -> Tensor:
        """Return the logits (classes, height, width) of a normalised image, the mean over windows."""
        s, (height, width) = self.settings, pixels.shape[1:]
        logits = torch.zeros(s.classes, height, width, device=pixels.device)
        seen = torch.zeros(height, width, device=pixels.device)
        boxes = windows(height, width, s.crop, s.stride)
        for start in range(0, len(boxes), s.batch):
            part = boxes[start : start + s.batch]
            crops = torch.stack([pixels[:, top:bottom, left:right] for top, left, bottom, right in part])
            found = on_pixels(crops, self.patch, self.head, self.grid)
            for (top, left, bottom, right), window in zip(part, found, strict=True):
                logits[:, top:bottom, left:right] += window
                seen[top:bottom, left:right] += 1
        return logits / seen

    def _size(self, size: tuple[int, int], ratio: float) -> tuple[int, int]:
        short = self.settings.short_side * ratio
        return short_side_size(*size, short, (self.settings.longest or math.inf) * short)

    def calls(self, size: tuple[int, int]) -> int:
        """Return how often :meth:`probabilities` calls the backbone for an image of this (height, width)."""
        s = self.settings
        counts = [len(windows(*self._size(size, ratio), s.crop, s.stride)) for ratio in s.ratios]
        return (1 + s.mirror) * sum(-(-count // s.batch) for count in counts)

    def test(
        self, pairs: Pairs, sizes: Sequence[tuple[int, int]], title: str = ""
    ) -> tuple[NDArray[np.int64], int, list[list[NDArray[np.uint8]]]]:
        """Return the confusion matrix over all images and how many cannot be read, on all ranks, and rows of pictures.

        The pictures are those of the first few of a rank's images.
        """
        s = self.settings
        count = min(s.max_test or len(pairs), len(pairs))
        confusion = np.zeros((s.classes, s.classes), np.int64)
        examples: list[list[NDArray[np.uint8]]] = []
        bad = torch.tensor(0)
        # Others' windows must be matched, since a sharded backbone's forward is collective.
        busiest = [
            max(self.calls(size) for size in sizes[start : min(start + self.world.size, count)])
            for start in range(0, count, self.world.size)
        ]
        side = -(-s.crop // self.patch) * self.patch
        blank = torch.zeros(1, 3, side, side, device=self.world.device)
        with progress_bar(title if self.world.rank == 0 else "", len(busiest)) as advance:
            for number, index in enumerate(own_share(count, self.world.rank, self.world.size)):
                made = 0
                pair = None if index is None else self._read(pairs, index)
                bad += index is not None and pair is None
                if pair is not None:
                    image, truth = pair
                    predicted = self.probabilities(image).argmax(dim=0).cpu().numpy()
                    confusion += confusion_matrix(truth, predicted, s.classes)
                    made = self.calls((image.height, image.width))
                    if len(examples) < EXAMPLES:
                        examples.append([np.asarray(image), _paint(truth, s.classes), _paint(predicted, s.classes)])
                for _ in range(busiest[number] - made):
                    self.grid(blank)
                advance(1)
        total = reduce_over_ranks(torch.from_numpy(confusion), self.world.size, self.world.device, dist.ReduceOp.SUM)
        bad = reduce_over_ranks(bad, self.world.size, self.world.device, dist.ReduceOp.SUM)
        return total.numpy(), int(bad), examples

    def _read(self, pairs: Pairs, index: int) -> tuple[Image.Image, NDArray[np.uint8]] | None:
        try:
            return pairs.image(index), labels_of(pairs, index, self.settings)
        except BadImage as error:
            leave_out(error)
            return None


class _Make:
    """A training sample of a pair; picklable, for loader processes."""

    def __init__(self, pairs: Pairs, settings: Settings) -> None:
        self.pairs, self.settings = pairs, settings

    def __call__(self, index: int, rng: np.random.Generator) -> Sample:
        s = self.settings
        image, labels = self.pairs.image(index), labels_of(self.pairs, index, s)
        return training_sample(image, labels, s.short_side, s.crop, rng, s.scales, s.longest)


def _paint(labels: NDArray[np.integer], classes: int) -> NDArray[np.uint8]:
    palette = np.concatenate([colours(classes), np.zeros((256 - classes, 3), np.uint8)])
    return palette[np.minimum(labels, VOID)]


def open_both(train: str, test: str, settings: Settings, cache: str | None, progress: bool) -> Any:
    """Return (training pairs, test pairs, sizes of the test images), after a look at all that are used.

    Raises:
        UserError: see :func:`eval.pairs.open_pairs` and :func:`eval.pairs.check_pairs`.
    """
    found: list[Any] = []
    sizes: list[tuple[int, int]] = []
    for spec, name, limit in ((train, "training", settings.max_train), (test, "test", settings.max_test)):
        pairs = open_pairs(spec, "segmentation", cache)
        title = f"check of {name} pairs" if progress else ""
        sizes = check_pairs(pairs, settings.classes, settings.first_class, settings.void, title, limit)
        found.append(pairs)
    return *found, sizes


def segment(
    grid: Grid,
    patch: int,
    train: Pairs,
    test: Pairs,
    sizes: Sequence[tuple[int, int]],
    settings: Settings,
    world: World,
    *,
    kept: int = 0,
    workers: int = 0,
    progress: bool = True,
    partial: Path | None = None,
    key: dict[str, Any] | None = None,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Return (metrics in percent, IoU by class and pictures); all ranks call this and get the same metrics.

    Args:
        kept: train on the features of so many central crops, made once, instead of on random crops.
        partial: folder for what an interrupted training goes on from; ``key``: what it depends on.

    Raises:
        NotFinite: the features are no finite numbers.
    """
    probe = grid(torch.zeros(1, 3, patch, patch, device=world.device))
    if not probe.isfinite().all():
        raise NotFinite("the features are not finite: the run diverged; use an earlier --step")
    segmenter = Segmenter(grid, patch, probe.shape[1], settings, world)
    if kept:
        segmenter.train_on_kept(train, min(kept, len(train)))
    else:
        file = None if partial is None else file_of(partial, f"{settings} {key} {train.fingerprint}")
        segmenter.train(train, workers, "steps of the head" if progress else "", file)
    confusion, bad, examples = segmenter.test(test, sizes, "test images" if progress else "")
    iou = [round(100 * value, 2) for value in intersection_over_union(confusion).tolist()]
    counts = {"pixels": int(confusion.sum()), "bad_images": bad}
    return segmentation_metrics(confusion), {"iou": iou, **counts, "examples": examples}


def online_segmentation(
    features: Features, config: Config, rank: int, world_size: int, device: torch.device
) -> dict[str, float]:
    """Return ``{"segmentation_miou": percent, …}`` for the backbone in training; all ranks call this together.

    ``eval.train`` and ``eval.test`` must be scenes or have annotations, whose values ``eval.classes``, ``first_class``
    and ``void`` explain. Features of at most 512 training images are
    made once; the head, on the last block, then takes 200 steps on them. Features that are not finite give NaN.
    """
    c = config.eval
    train, test = command.specs_of(config, None, None, "segmentation")
    kept = min(c.max_train or KEPT, KEPT)
    settings = Settings(
        max_train=kept, max_test=c.max_test, seed=config.seed, batch=c.batch,
        classes=c.classes, first_class=c.first_class, void=tuple(c.void),
    )  # fmt: skip
    pairs = open_pairs(train, "segmentation", config.data.cache)
    if isinstance(pairs, ScenePairs):
        settings = for_scenes(pairs, settings)
    settings = replace(
        settings, iterations=200, warmup=10, rate=1e-2, short_side=c.resize, crop=c.size, stride=max(1, 2 * c.size // 3)
    )
    first, second, sizes = open_both(train, test, settings, config.data.cache, progress=False)
    patch, world = config.model.patch, World(rank, world_size, rank, device)
    try:
        grid = grid_of(features, patch, patch_grid)
        metrics, _ = segment(grid, patch, first, second, sizes, settings, world, kept=kept, progress=False)
    except NotFinite:
        metrics = dict.fromkeys(("miou", "accuracy", "mean_accuracy"), float("nan"))
    return {f"segmentation_{name}": value for name, value in metrics.items()}


def check(settings: Settings) -> None:
    """Refuse impossible settings. Raises :class:`UserError`."""
    command.require_positive(
        settings, "batch", "classes", "blocks", "short_side", "scales", "crop", "stride", "ratios", "iterations",
        "train_batch", "rate",
        zero=("longest", "first_class", "void", "weight_decay", "warmup", "max_train", "max_test", "seed"),
    )  # fmt: skip
    if settings.classes >= VOID:
        raise UserError(f"--classes {settings.classes} is impossible; valid: fewer than {VOID}")
    if len(settings.scales) != 2 or settings.scales[0] > settings.scales[1]:
        raise UserError(f"--scales {[*settings.scales]} is impossible; valid: the smallest and the largest factor")
    if settings.stride > settings.crop:
        raise UserError(f"--stride {settings.stride} leaves gaps between windows of --crop {settings.crop}; use less")


def run(arguments: argparse.Namespace) -> Path | None:
    """Evaluate as the command line says, print a line and return the file of the results (None: nowhere to write)."""
    with command.open_subject(arguments) as subject:
        config = subject.config
        train, test = command.specs_of(config, arguments.train, arguments.test, "segmentation")
        cache = config.data.cache if config else None
        defaults = Settings()
        if train.startswith("scenes:"):
            defaults = for_scenes(open_pairs(train, "segmentation"), defaults)  # type: ignore[arg-type]
        if arguments.multi_scale:
            defaults = replace(defaults, **MULTI_SCALE)
        settings = command.read_settings(arguments, defaults, None)
        check(settings)
        blocks = subject.last_blocks(settings.blocks)
        settings = replace(settings, blocks=len(blocks))
        first, second, sizes = open_both(train, test, settings, cache, progress=subject.world.rank == 0)
        evaluation = command.Evaluation(
            subject, "segmentation_ms" if settings.multi_scale else "segmentation", settings,
            {"train": train, "test": test}, (len(first), len(second)), arguments.output,
        )  # fmt: skip
        grid = grid_of(subject.features(0, blocks), subject.patch, patch_grid)
        metrics, more = segment(
            grid, subject.patch, first, second, sizes, settings, subject.world, workers=arguments.workers,
            partial=evaluation.partial(), key=subject.key(),
        )  # fmt: skip
        examples = more.pop("examples")
        more["data"] = {
            "train_images": min(settings.max_train or len(first), len(first)),
            "test_images": min(settings.max_test or len(second), len(second)) - more["bad_images"],
            "bad_images": more.pop("bad_images"),
        }
        if subject.world.rank == 0:
            print(f"segmentation of {subject}: mIoU {metrics['miou']:.2f} %, accuracy {metrics['accuracy']:.2f} %")
        file = evaluation.finish("miou", metrics, **more)
        if file is not None and examples:
            tile(examples).save(file.with_name("examples.png"))
        return file


def _parser() -> argparse.ArgumentParser:
    parser = command.build_parser(
        "eval/segmentation.py", "Segmentation by a linear head on frozen patch tokens, as in DINOv2.", Settings
    )
    command.add_data(
        parser,
        "images with annotations to learn from, e.g. folder:ADE#training",
        "images to test on",
        kind="segmentation",
    )
    return parser


def main() -> int:
    """Run the command line."""
    run(_parser().parse_args())
    return 0


if __name__ == "__main__":
    run_cli(main)
