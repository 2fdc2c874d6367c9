"""Monocular depth by a linear head on frozen patch tokens: RMSE, AbsRel and δ.

python eval/depth.py --weights model.safetensors --train folder:NYU#train --test folder:NYU#test [--layers 4]
python eval/depth.py --weights runs/NAME --train scenes:n=2000 --test scenes:n=500,split=test

DINOv2's linear protocol on NYUv2 (arXiv 2304.07193, section 7.4): patch tokens with the class token beside each, of
the last block or of four, through one linear layer to 256 bins of depth; scale-invariant log loss; predictions
averaged with those of the mirrored image; errors inside the Eigen crop.
"""

from __future__ import annotations

import argparse
import math
import sys
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
    grid_of,
    keep_grids,
    leave_out,
    on_pixels,
    own_share,
    tile,
    to_input,
    train_head,
    warm,
)
from eval.depth_crops import training_sample
from eval.features import BLOCKS, Features, NotFinite, progress_bar, reduce_over_ranks
from eval.metrics import DEPTH_METRICS, depth_metrics
from eval.pairs import Pairs, check_pairs, open_pairs
from eval.resumption import file_of

NYU_SIZE = (480, 640)
EIGEN_CROP = (45, 41, 471, 601)
"""Top, left, bottom, right of the pixels that count (Eigen et al.), of NYUv2's 480 × 640."""
UPSAMPLE = 4
BIN_FLOOR = 0.1
EXAMPLES = 4
_EPS = 1e-3
_MEAN_WEIGHT = 0.15
_MEAN_ONLY_STEPS = 100
_PUBLISHED_LAYERS = {24: (5, 12, 18, 24)}


@dataclass
class Settings:
    """How the head is trained and what counts; the defaults are the published ones for NYUv2."""

    layers: int = 1
    """The head reads the last block (1) or four blocks spread over the depth (4)."""
    bins: int = 256
    """Bins of depth, evenly spaced between min-depth and max-depth."""
    min_depth: float = 0.001
    """Least depth, metres."""
    max_depth: float = 10.0
    """Greatest depth, metres."""
    depth_scale: float = 1000.0
    """Units of the depth files to a metre."""
    crop: tuple[int, int] = (416, 544)
    """Height and width of training crops, pixels; 0 0: whole images."""
    nyu: bool = True
    """Cut NYUv2's border off training images, and count only the Eigen crop."""
    iterations: int = 38_400
    """Steps of training."""
    train_batch: int = 16
    """Images of a step, over all processes."""
    rate: float = 1e-4
    """Learning rate of AdamW after the warm-up; it falls to 0 as a cosine."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    warmup: int = 12_800
    """Steps of linear warm-up."""
    max_train: int = 0
    """Use only this many training images; 0: all."""
    max_test: int = 0
    """Use only this many test images; 0: all."""
    seed: int = 0
    """Seed of the head, the order of images and the augmentation."""


def for_scenes(settings: Settings) -> Settings:
    """Return settings that suit rendered scenes: whole images, a short training at a higher rate."""
    return replace(settings, crop=(0, 0), nyu=False, iterations=1000, rate=1e-3, warmup=100)


def layer_numbers(depth: int, layers: int) -> list[int]:
    """Return the blocks (from 0 on) that a head of 1 or 4 ``layers`` reads in a backbone of ``depth`` blocks.

    Four are spread evenly, as published: 3, 6, 9, 12 of twelve, 10, 20, 30, 40 of forty; but 5, 12, 18, 24 of 24.
    """
    if layers == 1:
        return [depth - 1]
    even = tuple(max(1, round(depth * part / 4)) for part in (1, 2, 3, 4))
    return sorted({number - 1 for number in _PUBLISHED_LAYERS.get(depth, even)})


def tokens_with_class(outputs: dict[str, Tensor], rows: int, columns: int) -> Tensor:
    """Return each asked-for block's patch tokens with its class token beside each: (B, n·2·D, rows, columns)."""
    blocks = outputs.get(BLOCKS)
    if blocks is None:
        pairs = [(outputs["x_norm_patchtokens"], outputs["x_norm_clstoken"])]
    else:
        pairs = [(block[:, -rows * columns :], block[:, 0]) for block in blocks]
    parts = [part for patches, cls in pairs for part in (patches, cls[:, None].expand_as(patches))]
    return torch.cat(parts, dim=2).transpose(1, 2).unflatten(2, (rows, columns))


def depth_of(logits: Tensor, low: float, high: float) -> Tensor:
    """Return the depth (B, 1, H, W) that logits (B, bins, H, W) of evenly spaced bins mean.

    Weights relu(logit) + .1, normalised to a sum of 1 (the "linear" norm of AdaBins' successors), times the bins.
    """
    weights = logits.relu() + BIN_FLOOR
    bins = torch.linspace(low, high, logits.shape[1], device=logits.device, dtype=logits.dtype)
    return torch.einsum("bkhw,k->bhw", weights, bins)[:, None] / weights.sum(dim=1, keepdim=True)


def silog_loss(
    predicted: Tensor, truth: Tensor, valid: Tensor, step: int = _MEAN_ONLY_STEPS, world_size: int = 1
) -> Tensor:
    """Return √(Var g + .15 (mean g)²) with g = log p − log t over all ranks' valid pixels (Eigen et al.; AdaBins).

    In the first 100 steps only the mean counts. Its gradients on all ranks add up to those of one loss.
    """
    g = (torch.log(predicted[valid] + _EPS) - torch.log(truth[valid] + _EPS)).double()
    own = torch.stack([g.sum(), g.square().sum(), g.new_tensor(float(g.numel()))])
    total = own
    if world_size > 1:
        others = own.detach().clone()
        dist.all_reduce(others)
        total = own + (others - own.detach())
    count = total[2].detach()
    if count < 2:
        return 0.0 * g.sum()
    mean = total[0] / count
    variance = (total[1] / count - mean.square()).clamp(min=0) * count / (count - 1)
    inner = _MEAN_WEIGHT * mean.square() + (variance if step >= _MEAN_ONLY_STEPS else 0.0)
    return inner.clamp(min=1e-12).sqrt().float()


class DepthEstimator:
    """A head on a frozen backbone.

    Args:
        grid: features of images whose sides the patch divides. channels: of those.
    """

    def __init__(self, grid: Grid, patch: int, channels: int, settings: Settings, world: World) -> None:
        self.grid, self.patch, self.settings, self.world = grid, patch, settings, world
        self.head = LinearHead(channels, settings.bins, False, settings.seed, world.size).to(world.device)

    def depth(self, images: Tensor) -> Tensor:
        """Return the depth (B, H, W) of normalised images (B, 3, H, W), metres."""
        return on_pixels(images, self.patch, self.from_grid, self.grid)[:, 0]

    def from_grid(self, inputs: Tensor) -> Tensor:
        """Return the depth (B, 1, 4·h, 4·w) that a grid of features (B, C, h, w) gives, metres."""
        # The linear layer and bilinear interpolation commute; at the patches it costs a sixteenth.
        logits = self.head(inputs)
        size = (logits.shape[2] * UPSAMPLE, logits.shape[3] * UPSAMPLE)
        finer = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return depth_of(finer, self.settings.min_depth, self.settings.max_depth)

    def train(self, pairs: Pairs, workers: int = 0, title: str = "", kept: Path | None = None) -> None:
        """Train the head on ``pairs``; all ranks call this. ``kept``: see :func:`eval.dense.train_head`."""
        s = self.settings
        count = min(s.max_train or len(pairs), len(pairs))
        samples = Samples(count, _Make(pairs, s), s.train_batch, s.seed, self.world.rank, self.world.size, 0.0)
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
        return s.rate * 0.5 * (1 + math.cos(math.pi * step / s.iterations)) * warm(step, s.warmup, 1e-3)

    def _loss(self, images: Tensor, targets: Tensor, count: int, step: int) -> Tensor:
        return silog_loss(self.depth(images), targets, self._valid(targets), step, self.world.size)

    def _valid(self, targets: Tensor) -> Tensor:
        return (targets > self.settings.min_depth) & (targets <= self.settings.max_depth)

    def train_on_kept(self, pairs: Pairs, count: int, size: int, batch: int) -> None:
        """Train the head on features of central crops that are made once; ranks share only the making."""
        s = self.settings
        grids, targets = keep_grids(self.grid, pairs, pairs.target, count, size, batch, self.world, 0.0)

        def loss(kept: Tensor, truth: Tensor, number: int, step: int) -> Tensor:
            depth = F.interpolate(self.from_grid(kept), size=truth.shape[1:], mode="bilinear", align_corners=False)
            return silog_loss(depth[:, 0], truth, self._valid(truth), step)

        optimizer = torch.optim.AdamW(self.head.parameters(), s.rate, weight_decay=s.weight_decay)
        samples = KeptSamples(grids, targets, s.train_batch, s.seed)
        train_head(self.head, samples, loss, self._rate, optimizer, s.iterations, replace(self.world, rank=0, size=1))

    @torch.no_grad()
    def predict(self, image: Image.Image) -> NDArray[np.float32]:
        """Return the depth (height, width) of an image: the mean over it and its mirror image, within the limits."""
        pixels = torch.from_numpy(to_input(image)).to(self.world.device)
        both = self.depth(torch.stack([pixels, pixels.flip(-1)]))
        mean = (both[0] + both[1].flip(-1)) / 2
        return mean.clamp(self.settings.min_depth, self.settings.max_depth).cpu().numpy()

    def test(self, pairs: Pairs, title: str = "") -> tuple[dict[str, float], int, int, list[list[NDArray[np.uint8]]]]:
        """Return the metrics, each the mean over images, how many images counted and how many cannot be read, and rows
        of pictures of the first few of a rank's images."""
        s = self.settings
        count = min(s.max_test or len(pairs), len(pairs))
        sums = torch.zeros(len(DEPTH_METRICS) + 2, dtype=torch.float64)
        examples: list[list[NDArray[np.uint8]]] = []
        side = self.patch
        with progress_bar(title if self.world.rank == 0 else "", -(-count // self.world.size)) as advance:
            for index in own_share(count, self.world.rank, self.world.size):
                advance(1)
                pair = None if index is None else _read(pairs, index)
                if pair is None:  # a sharded backbone's forward is collective
                    self.grid(torch.zeros(2, 3, side, side, device=self.world.device))
                    sums[-1] += index is not None
                    continue
                image, truth = pair
                predicted = self.predict(image)
                found = depth_metrics(truth, predicted, counted(truth, s))
                if found is not None:
                    sums[:-1] += torch.tensor([*(found[name] for name in DEPTH_METRICS), 1.0], dtype=torch.float64)
                if len(examples) < EXAMPLES:
                    high = float(truth.max())
                    examples.append([np.asarray(image), _paint(truth, high), _paint(predicted, high)])
        sums = reduce_over_ranks(sums, self.world.size, self.world.device, dist.ReduceOp.SUM)
        number, bad = map(int, sums[-2:])
        means = (sums[:-2] / number).tolist() if number else [float("nan")] * len(DEPTH_METRICS)
        return dict(zip(DEPTH_METRICS, means, strict=True)), number, bad, examples


def _read(pairs: Pairs, index: int) -> tuple[Image.Image, NDArray[np.floating]] | None:
    try:
        return pairs.image(index), pairs.target(index)
    except BadImage as error:
        leave_out(error)
        return None


def counted(truth: NDArray[np.floating], settings: Settings) -> NDArray[np.bool_]:
    """Return which pixels count: a known depth within the limits, for NYUv2 inside the Eigen crop."""
    valid = (truth > settings.min_depth) & (truth < settings.max_depth)
    if settings.nyu:
        top, left, bottom, right = EIGEN_CROP
        inside = np.zeros_like(valid)
        inside[top:bottom, left:right] = True
        valid &= inside
    return valid


class _Make:
    """A training sample of a pair; picklable, for loader processes."""

    def __init__(self, pairs: Pairs, settings: Settings) -> None:
        self.pairs, self.settings = pairs, settings

    def __call__(self, index: int, rng: np.random.Generator) -> Sample:
        s = self.settings
        return training_sample(self.pairs.image(index), self.pairs.target(index), s.crop, s.nyu, rng)


def _paint(depth: NDArray[np.floating], high: float) -> NDArray[np.uint8]:
    from matplotlib import colormaps  # here, since a run that evaluates itself draws nothing

    return (colormaps["viridis"](np.clip(depth / max(high, 1e-6), 0, 1))[..., :3] * 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# During training, and the command.


def estimate(
    grid: Grid,
    patch: int,
    train: Pairs,
    test: Pairs,
    settings: Settings,
    world: World,
    *,
    kept: tuple[int, int, int] | None = None,
    workers: int = 0,
    progress: bool = True,
    partial: Path | None = None,
    key: dict[str, Any] | None = None,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Return (metrics, number of images that counted and pictures); all ranks get the same metrics.

    Args:
        kept: (images, size, batch): train on the features of so many central crops of this size, made once, a batch at
            a time, instead of on augmented images.
        partial: folder for what an interrupted training goes on from; ``key``: what it depends on.

    Raises:
        NotFinite: the features are no finite numbers.
    """
    probe = grid(torch.zeros(1, 3, patch, patch, device=world.device))
    if not probe.isfinite().all():
        raise NotFinite("the features are not finite: the run diverged; use an earlier --step")
    estimator = DepthEstimator(grid, patch, probe.shape[1], settings, world)
    if kept:
        estimator.train_on_kept(train, min(kept[0], len(train)), *kept[1:])
    else:
        file = None if partial is None else file_of(partial, f"{settings} {key} {train.fingerprint}")
        estimator.train(train, workers, "steps of the head" if progress else "", file)
    metrics, number, bad, examples = estimator.test(test, "test images" if progress else "")
    return metrics, {"images": number, "bad_images": bad, "examples": examples}


def open_both(train: str, test: str, settings: Settings, cache: str | None, progress: bool) -> tuple[Pairs, Pairs]:
    """Return (training pairs, test pairs), after a look at all that are used. Raises :class:`UserError`."""
    found = []
    for spec, name, limit in ((train, "training", settings.max_train), (test, "test", settings.max_test)):
        pairs = open_pairs(spec, "depth", cache, depth_scale=settings.depth_scale)
        sizes = check_pairs(pairs, title=f"check of {name} pairs" if progress else "", limit=limit)
        odd = next((n for n, size in enumerate(sizes) if settings.nyu and size != NYU_SIZE), None)
        if odd is not None:
            raise UserError(
                f"'{spec}': {pairs.name(odd)} has {sizes[odd][1]}×{sizes[odd][0]} pixels, NYUv2's have 640×480\n"
                "the Eigen crop means nothing here; use --no-nyu, and a --crop that fits"
            )
        if name == "training" and not any(settings.crop) and len(set(sizes)) > 1:
            raise UserError(f"'{spec}': its images differ in size, so they need --crop HEIGHT WIDTH")
        found.append(pairs)
    return found[0], found[1]


def online_depth(
    features: Features, config: Config, rank: int, world_size: int, device: torch.device
) -> dict[str, float]:
    """Return ``{"depth_rmse": metres, …}`` for the backbone in training; all ranks call this together.

    ``eval.train`` and ``eval.test`` must be scenes or have depth. Features of at most 512 training images are made
    once; the head, on the last block, then takes 200 steps on them. Features that are not finite give NaN.
    """
    c = config.eval
    train, test = command.specs_of(config, None, None, "depth estimation")
    number = min(c.max_train or KEPT, KEPT)
    settings = Settings(max_train=number, max_test=c.max_test, seed=config.seed)
    if train.startswith("scenes:"):
        settings = for_scenes(settings)
    settings = replace(settings, iterations=200, warmup=20, rate=1e-2)
    first, second = open_both(train, test, settings, config.data.cache, progress=False)
    world, patch = World(rank, world_size, rank, device), config.model.patch
    grid = grid_of(features, patch, tokens_with_class)
    try:
        kept = (number, c.size, c.batch)
        metrics, _ = estimate(grid, patch, first, second, settings, world, kept=kept, progress=False)
    except NotFinite:
        metrics = dict.fromkeys(DEPTH_METRICS, float("nan"))
    return {f"depth_{name}": value for name, value in metrics.items()}


def check(settings: Settings) -> None:
    """Refuse impossible settings. Raises :class:`UserError`."""
    command.require_positive(
        settings, "layers", "bins", "min_depth", "max_depth", "depth_scale", "iterations", "train_batch", "rate",
        zero=("crop", "weight_decay", "warmup", "max_train", "max_test", "seed"),
    )  # fmt: skip
    if settings.layers not in (1, 4):
        raise UserError(f"--layers {settings.layers} is impossible; valid: 1 or 4")
    if settings.min_depth >= settings.max_depth:
        raise UserError(f"--min-depth {settings.min_depth} is not below --max-depth {settings.max_depth}")
    if len(settings.crop) != 2:
        raise UserError(f"--crop {[*settings.crop]} is impossible; valid: a height and a width, or 0 0")


def run(arguments: argparse.Namespace) -> Path | None:
    """Evaluate as the command line says, print a line and return the file of the results (None: nowhere to write)."""
    with command.open_subject(arguments) as subject:
        config = subject.config
        train, test = command.specs_of(config, arguments.train, arguments.test, "depth estimation")
        defaults = for_scenes(Settings()) if train.startswith("scenes:") else Settings()
        settings = command.read_settings(arguments, defaults, None)
        check(settings)
        cache = config.data.cache if config else None
        first, second = open_both(train, test, settings, cache, progress=subject.world.rank == 0)
        task = "depth" if settings.layers == 1 else "depth_4_layers"
        evaluation = command.Evaluation(
            subject, task, settings, {"train": train, "test": test}, (len(first), len(second)), arguments.output
        )
        depth = 1 if subject.model is None else len(subject.model.blocks)
        blocks = layer_numbers(depth, settings.layers)
        grid = grid_of(subject.features(0, blocks), subject.patch, tokens_with_class)
        metrics, more = estimate(
            grid, subject.patch, first, second, settings, subject.world, workers=arguments.workers,
            partial=evaluation.partial(), key=subject.key(),
        )  # fmt: skip
        examples = more.pop("examples")
        more["blocks"] = [number + 1 for number in blocks]
        more["data"] = {
            "train_images": min(settings.max_train or len(first), len(first)),
            "test_images": more.pop("images"),
            "bad_images": more.pop("bad_images"),
        }
        if subject.world.rank == 0:
            print(
                f"depth of {subject}: RMSE {metrics['rmse']:.4f} m, AbsRel {metrics['abs_rel']:.4f}, "
                f"δ1 {metrics['delta_1']:.4f}"
            )
        file = evaluation.finish("rmse", metrics, **more)
        if file is not None and examples:
            tile(examples).save(file.with_name("examples.png"))
        return file


def _parser() -> argparse.ArgumentParser:
    parser = command.build_parser(
        "eval/depth.py", "Depth by a linear head on frozen patch tokens, as in DINOv2.", Settings
    )
    command.add_data(
        parser, "images with depth to learn from, e.g. folder:NYU#train", "images to test on", kind="depth"
    )
    return parser


def main() -> int:
    """Run the command line."""
    run(_parser().parse_args())
    return 0


if __name__ == "__main__":
    run_cli(main)
