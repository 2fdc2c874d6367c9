"""Weighted k-nearest-neighbour classification on frozen features, as DINO and DINOv2 report it (arXiv 1805.01978).

python eval/knn.py --weights runs/NAME                      # the newest checkpoint, data and sizes of the run
python eval/knn.py --weights model.safetensors --train folder:PATH --test folder:PATH
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dinov2_fsdp.config import Config, EvalConfig
from dinov2_fsdp.data.sources import Source
from dinov2_fsdp.errors import UserError, run_cli
from dinov2_fsdp.rng import generator
from eval import command
from eval.classes import check_sources
from eval.features import Extracted, Features, check_finite, extract, not_finite, reduce_over_ranks, subset
from eval.neighbours import knn_accuracy, labels_by_index
from eval.results import without_idle_limits

# ---------------------------------------------------------------------------------------------------------------------
# From images to accuracy.


@dataclass
class Settings:
    """How images become features and features become votes."""

    resize: int = 256
    """Shorter side before the central crop, pixels."""
    size: int = 224
    """Central crop, pixels; a multiple of the patch."""
    batch: int = 64
    """Images that go through the backbone at once."""
    k: tuple[int, ...] = (1, 10, 20, 100, 200)
    """Neighbours that vote, e.g. 1 10 20."""
    temperature: float = 0.07
    """Temperature of the votes."""
    max_train: int = 0
    """Use only this many images of the bank; 0: all."""
    max_test: int = 0
    """Use only this many test images; 0: all."""
    per_class: tuple[int, ...] = ()
    """Few-shot: also with banks of only so many images of each class, e.g. 1 5 10."""
    tries: int = 5
    """How many banks are drawn for each few-shot number; their mean is reported."""
    seed: int = 0
    """Seed of the few-shot banks."""

    @classmethod
    def of(cls, config: EvalConfig) -> Settings:
        """Return the settings of a run's config."""
        c = config
        return cls(c.resize, c.size, c.batch, tuple(c.k), c.temperature, c.max_train, c.max_test)


def open_both(config: Config | None, train: str | None = None, test: str | None = None) -> tuple[Source, Source]:
    """Return the sources of the memory bank and of the test images: as given, or else as the config says.

    Raises:
        UserError: one is given nowhere, cannot be opened, has no labels, or has other classes than the other.
    """
    sources = command.open_both(config, train, test, "k-NN")
    check_sources(*sources)
    return sources


def features_of_both(
    features: Features,
    train: Source,
    test: Source,
    settings: Settings,
    device: torch.device,
    *,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    progress: bool = False,
    partial: tuple[Path | None, Path | None] = (None, None),
    key: dict[str, Any] | None = None,
) -> tuple[Extracted, Extracted]:
    """Return this rank's share of the features of the memory bank and of the test images.

    ``partial`` and ``key``: see :func:`eval.features.extract`.
    """
    bank, queries = (
        extract(
            features,
            source,
            resize=settings.resize,
            size=settings.size,
            batch=settings.batch,
            device=device,
            rank=rank,
            world_size=world_size,
            workers=workers,
            max_images=limit,
            progress=title if progress else "",
            partial=folder,
            key=key,
        )
        for source, limit, title, folder in (
            (train, settings.max_train, "memory bank", partial[0]),
            (test, settings.max_test, "test images", partial[1]),
        )
    )
    return bank, queries


def online_knn(
    features: Features, config: Config, rank: int, world_size: int, device: torch.device
) -> dict[str, float]:
    """Return ``{"knn_1": percent, …}`` for the backbone in training; all ranks call this and get the same answer.

    Each k that exceeds the memory bank is left out with a warning. Features that are not finite give NaN.

    Raises:
        UserError: no test set is configured, data are unlabelled, or the classes differ.
    """
    settings = Settings.of(config.eval)
    train, test = open_both(config)
    bank, queries = features_of_both(
        features, train, test, settings, device, rank=rank, world_size=world_size, workers=config.data.workers
    )
    counts = torch.tensor([len(bank.features), not_finite(bank) + not_finite(queries)])
    size, broken = reduce_over_ranks(counts, world_size, device, dist.ReduceOp.SUM).tolist()
    if broken:
        return {f"knn_{k}": float("nan") for k in settings.k}
    fitting = [k for k in settings.k if k <= size]
    if len(fitting) < len(settings.k) and rank == 0:
        left_out = [k for k in settings.k if k > size]
        warnings.warn(f"k-NN leaves out k={left_out}: the memory bank holds {size} images", stacklevel=2)
    if not fitting:
        return {}
    accuracy = knn_accuracy(
        bank.features,
        bank.labels,
        queries.features,
        queries.labels,
        fitting,
        settings.temperature,
        bank_indices=bank.indices,
        world_size=world_size,
        device=device,
    )
    return {f"knn_{k}": percent for k, percent in accuracy.items()}


def few_shot(
    bank: Extracted,
    queries: Extracted,
    settings: Settings,
    world_size: int = 1,
    device: torch.device | None = None,
) -> dict[str, float]:
    """Return ``{"knn_20_5_per_class": percent, …}``: means over the tries, and ``…_std``, for each few-shot number.

    Each try draws so many images of each class; a k above the number of images drawn is left out. All ranks call this,
    each with its share, and get the same answer.
    """
    device = device or queries.features.device
    labels = labels_by_index(bank.indices, bank.labels, world_size, device)
    found: dict[str, float] = {}
    for number in settings.per_class:
        accuracies: dict[int, list[float]] = {}
        for attempt in range(settings.tries):
            chosen = draw_per_class(labels, number, settings.seed, attempt)
            own = torch.from_numpy(np.isin(bank.indices.numpy(), chosen))
            accuracy = knn_accuracy(
                bank.features[own],
                bank.labels[own],
                queries.features,
                queries.labels,
                [k for k in settings.k if k <= len(chosen)],
                settings.temperature,
                bank_indices=bank.indices[own],
                world_size=world_size,
                device=device,
            )
            for k, percent in accuracy.items():
                accuracies.setdefault(k, []).append(percent)
        for k, percents in accuracies.items():
            found[f"knn_{k}_{number}_per_class"] = float(np.mean(percents))
            found[f"knn_{k}_{number}_per_class_std"] = float(np.std(percents))
    return found


def draw_per_class(labels: np.ndarray, number: int, seed: int, attempt: int) -> np.ndarray:
    """Return the rising indices of ``number`` images of each class; ``labels`` (n,) holds −1 where there is no image.

    Raises:
        UserError: a class has fewer images.
    """
    classes, counts = np.unique(labels[labels >= 0], return_counts=True)
    if counts.min() < number:
        few = int(classes[counts.argmin()])
        raise UserError(
            f"--per-class {number} is more than the {counts.min()} images of class {few}; use at most {counts.min()}"
        )
    order = generator(seed, "few-shot", number, attempt).permutation(len(labels))
    chosen = [order[labels[order] == label][:number] for label in classes]
    return np.sort(np.concatenate(chosen))


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def run(arguments: argparse.Namespace) -> Path | None:
    """Evaluate as the command line says, print a table and return the file of the results (None: nowhere to write)."""
    with command.open_subject(arguments) as subject:
        settings = command.read_settings(arguments, Settings(), subject.config)
        command.check_sizes(settings)
        command.require_positive(
            settings, "k", "temperature", "per_class", "tries", zero=("max_train", "max_test", "seed")
        )
        features = subject.features(settings.size)
        train, test = open_both(subject.config, arguments.train, arguments.test)
        bank_size = min(settings.max_train or len(train), len(train))
        if max(settings.k) > bank_size:
            raise UserError(
                f"k={max(settings.k)} is larger than the memory bank of {bank_size} images; "
                f"use --k of at most {bank_size}"
            )
        check_few_shot(settings, train)
        evaluation = command.Evaluation(
            subject,
            "knn",
            settings,
            {"train": train.spec, "test": test.spec},
            (len(train), len(test)),
            arguments.output,
        )
        rank, size, device = subject.world.rank, subject.world.size, subject.world.device
        bank, queries = features_of_both(
            features,
            train,
            test,
            settings,
            device,
            rank=rank,
            world_size=size,
            workers=arguments.workers,
            progress=True,
            partial=(evaluation.partial("train"), evaluation.partial("test")),
            key=subject.key(features="class token"),
        )
        check_finite((bank, queries), size, device)
        accuracy = knn_accuracy(
            bank.features,
            bank.labels,
            queries.features,
            queries.labels,
            settings.k,
            settings.temperature,
            bank_indices=bank.indices,
            world_size=size,
            device=device,
        )
        metrics = {f"knn_{k}": percent for k, percent in accuracy.items()}
        counts = _sum_counts(counts_of(bank, queries), size, device)
        if rank == 0:
            _print_table(
                metrics, f"k-NN of {subject.backbone}" + (f", step {subject.step}" if subject.step else ""), counts
            )
        shots = few_shot(bank, queries, settings, size, device)
        if rank == 0:
            for name, percent in shots.items():
                if not name.endswith("_std"):
                    print(f"{name.removeprefix('knn_'):>22}   {percent:7.2f} ± {shots[f'{name}_std']:.2f}")
        return evaluation.finish(
            headline(metrics), {**metrics, **shots}, data=counts, features=_FEATURES[subject.backbone]
        )


def check_few_shot(settings: Settings, train: Source) -> None:
    """Refuse few-shot banks that cannot be drawn, or are smaller than every k. Raises :class:`UserError`."""
    assert train.labels is not None
    labels = np.asarray(train.labels)[subset(train, settings.max_train)]
    for number in settings.per_class:
        size = len(draw_per_class(labels, number, settings.seed, 0))
        if size < min(settings.k):
            raise UserError(
                f"--per-class {number} makes banks of {size} images, too few for --k {min(settings.k)}; "
                f"use a --k of at most {size} too"
            )


def _sum_counts(counts: dict[str, int], world_size: int, device: torch.device) -> dict[str, int]:
    total: Tensor = reduce_over_ranks(torch.tensor([*counts.values()]), world_size, device, dist.ReduceOp.SUM)
    return dict(zip(counts, total.tolist(), strict=True))


def describe(
    backbone: str,
    settings: Settings,
    device: torch.device,
    metrics: dict[str, float],
    train: Source,
    test: Source,
    counts: dict[str, int],
    seconds: float,
) -> dict[str, Any]:
    """Return what ``results.json`` says of a k-NN evaluation, but for the checkpoint and its step."""
    settings = without_idle_limits(settings, len(train), len(test))
    return {
        "task": "knn",
        "backbone": backbone,
        "settings": asdict(settings) | {"device": str(device), "features": _FEATURES[backbone]},
        "metrics": metrics,
        "data": {"train": train.spec, "test": test.spec, **counts},
        "seconds": round(seconds, 2),
    }


def counts_of(bank: Extracted, queries: Extracted) -> dict[str, int]:
    """Return how many images voted, were classified, and could not be read."""
    return {
        "bank_images": len(bank.labels),
        "test_images": len(queries.labels),
        "bad_images": len(bank.bad) + len(queries.bad),
    }


def headline(metrics: dict[str, float]) -> str:
    """Return the metric that stands for a k-NN evaluation: k = 20 as published, or else the first."""
    return "knn_20" if "knn_20" in metrics else next(iter(metrics))


_FEATURES = {
    "teacher": "class token of the teacher's backbone, L2-normalised",
    "untrained": "class token of the run's backbone before its first step, L2-normalised",
    "pixels": "all pixels, ImageNet mean and deviation taken out, flattened, L2-normalised",
}


def _print_table(metrics: dict[str, float], title: str, counts: dict[str, int]) -> None:
    bad = f", {counts['bad_images']} unreadable left out" if counts["bad_images"] else ""
    print(f"{title} ({counts['bank_images']} images in the bank, {counts['test_images']} test images{bad})")
    print("      k   top-1 %")
    for name, percent in metrics.items():
        print(f"{name.removeprefix('knn_'):>7}   {percent:7.2f}")


def _parser() -> argparse.ArgumentParser:
    parser = command.build_parser(
        "eval/knn.py",
        "Weighted k-nearest-neighbour classification on frozen features, as in DINO and DINOv2.",
        Settings,
        pixels=True,
    )
    command.add_data(
        parser, "labelled images of the memory bank, e.g. folder:PATH", "labelled images to classify, e.g. folder:PATH"
    )
    return parser


def main() -> int:
    """Run the command line."""
    run(_parser().parse_args())
    return 0


if __name__ == "__main__":
    run_cli(main)
