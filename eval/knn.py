"""Weighted k-nearest-neighbour classification on frozen features, as DINO and DINOv2 report it (arXiv 1805.01978).

python eval/knn.py --weights runs/NAME                      # the newest checkpoint, data and sizes of the run
python eval/knn.py --weights model.safetensors --train folder:PATH --test folder:PATH
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from dinov2_fsdp.config import Config, EvalConfig
from dinov2_fsdp.data.sources import Source, open_source
from dinov2_fsdp.errors import UserError, run_cli
from dinov2_fsdp.weights import load_backbone, untrained_backbone
from eval.features import Extracted, Features, choose_device, extract, frozen, pixel_features
from eval.neighbours import knn_accuracy, reduce_over_ranks
from eval.results import record, run_of

# ---------------------------------------------------------------------------------------------------------------------
# From images to accuracy.


@dataclass
class Settings:
    """How images become features and features become votes; sizes in pixels, ``max_…`` in images (0: all)."""

    resize: int
    size: int
    batch: int
    k: tuple[int, ...]
    temperature: float
    max_train: int
    max_test: int

    @classmethod
    def of(cls, config: EvalConfig) -> Settings:
        """Return the settings of a run's config."""
        c = config
        return cls(c.resize, c.size, c.batch, tuple(c.k), c.temperature, c.max_train, c.max_test)


def check_sources(train: Source, test: Source) -> None:
    """Refuse data that cannot be compared.

    Raises:
        UserError: a source has no labels, or the two do not hold the same classes.
    """
    for source in (train, test):
        if source.labels is None:
            raise UserError(
                f"'{source.spec}' has no labels, which k-NN needs; use e.g. folder:PATH with a folder per class"
            )
    if train.classes is None or test.classes is None or list(train.classes) == list(test.classes):
        return
    only_train = sorted(set(train.classes) - set(test.classes))
    only_test = sorted(set(test.classes) - set(train.classes))
    lines = [f"the classes of '{train.spec}' and '{test.spec}' differ"]
    lines += [f"only in the first: {_some(only_train)}"] if only_train else []
    lines += [f"only in the second: {_some(only_test)}"] if only_test else []
    if not only_train and not only_test:
        lines.append("they hold the same classes in different order; list them in one order")
    raise UserError("\n".join([*lines, "use two splits of one data set"]))


def open_both(config: Config | None, train: str | None = None, test: str | None = None) -> tuple[Source, Source]:
    """Return the sources of the memory bank and of the test images: as given, or else as the config says.

    Raises:
        UserError: one is given nowhere, cannot be opened, has no labels, or has other classes than the other.
    """
    if config is not None:
        train, test = train or config.eval.train or config.data.train, test or config.eval.test
    for value, name in ((train, "train"), (test, "test")):
        if value is None:
            raise UserError(f"k-NN needs labelled images; give --{name} SPEC or set eval.{name}=SPEC, e.g. folder:PATH")
    assert train is not None
    assert test is not None
    cache = config.data.cache if config else None
    sources = open_source(train, cache), open_source(test, cache)
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
) -> tuple[Extracted, Extracted]:
    """Return this rank's share of the features of the memory bank and of the test images."""
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
        )
        for source, limit, title in (
            (train, settings.max_train, "memory bank"),
            (test, settings.max_test, "test images"),
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
    counts = torch.tensor([len(bank.features), _not_finite(bank) + _not_finite(queries)])
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


def _not_finite(extracted: Extracted) -> int:
    return int((~torch.isfinite(extracted.features).all(dim=1)).sum()) if len(extracted.features) else 0


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f", … ({len(names)} in all)" if len(names) > limit else "")


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def measure(
    features: Features,
    train: Source,
    test: Source,
    settings: Settings,
    device: torch.device,
    *,
    workers: int = 0,
    progress: bool = True,
) -> tuple[dict[str, float], dict[str, int]]:
    """Return ({"knn_1": percent, …}, counts_of them) in this one process.

    Raises:
        UserError: features are not finite, or a k is larger than the bank.
    """
    bank_size = min(settings.max_train or len(train), len(train))
    if max(settings.k) > bank_size:
        raise UserError(
            f"k={max(settings.k)} is larger than the memory bank of {bank_size} images; use --k of at most {bank_size}"
        )
    bank, queries = features_of_both(features, train, test, settings, device, workers=workers, progress=progress)
    broken = _not_finite(bank) + _not_finite(queries)
    if broken:
        total = len(bank.features) + len(queries.features)
        raise UserError(
            f"the features of {broken} of {total} images are not finite: the run diverged; use an earlier --step"
        )
    accuracy = knn_accuracy(
        bank.features, bank.labels, queries.features, queries.labels, settings.k, settings.temperature, device=device
    )
    return {f"knn_{k}": percent for k, percent in accuracy.items()}, counts_of(bank, queries)


def run(arguments: argparse.Namespace) -> Path | None:
    """Evaluate as the command line says, print a table and return the file of the results (None: nowhere to write)."""
    started = time.monotonic()
    if arguments.weights is None and not (arguments.pixels and arguments.train and arguments.test):
        raise UserError(
            "--weights PATH is needed: a run, a checkpoint or an exported file\n"
            "(only --pixels with --train and --test goes without)"
        )
    loaded = None if arguments.weights is None else load_backbone(arguments.weights, step=arguments.step)
    config = None if loaded is None else loaded.config
    device = choose_device(arguments.device)
    settings = Settings.of(config.eval if config else EvalConfig())
    for name in asdict(settings):
        if (value := getattr(arguments, name)) is not None:
            setattr(settings, name, tuple(value) if name == "k" else value)
    _check_settings(settings)

    backbone, step = "teacher", loaded.step if loaded else None
    if arguments.pixels:
        features: Features = pixel_features
        backbone, step = "pixels", 0
    else:
        assert loaded is not None
        model = loaded.model
        if arguments.untrained:
            if config is None:
                raise UserError(
                    f"--untrained needs a run's config, which {arguments.weights} does not hold; give a run directory"
                )
            model, backbone, step = untrained_backbone(config), "untrained", 0
        features = frozen(model, settings.size, device)

    train, test = open_both(config, arguments.train, arguments.test)
    metrics, counts = measure(features, train, test, settings, device, workers=arguments.workers)

    _print_table(metrics, f"k-NN of {backbone}" + (f", step {step}" if step else ""), counts)
    results = describe(backbone, settings, device, metrics, train, test, counts, time.monotonic() - started)
    results |= {"checkpoint": loaded.source if loaded and backbone == "teacher" else None, "step": step}
    run_folder = run_of(Path(arguments.weights)) if arguments.weights else None
    return record(
        results, "knn" if backbone == "teacher" else f"knn_{backbone}", headline(metrics), run_folder, arguments.output
    )


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


def _check_settings(settings: Settings) -> None:
    for name in ("resize", "size", "batch", "temperature"):
        if getattr(settings, name) <= 0:
            raise UserError(f"--{name} {getattr(settings, name)} is impossible; valid: a number above 0")
    if settings.resize < settings.size:
        raise UserError(f"--resize {settings.resize} is smaller than --size {settings.size}; valid: at least the size")
    if min(settings.k) < 1:
        raise UserError(f"--k {min(settings.k)} is impossible; valid: numbers of neighbours from 1 on")


def _print_table(metrics: dict[str, float], title: str, counts: dict[str, int]) -> None:
    bad = f", {counts['bad_images']} unreadable left out" if counts["bad_images"] else ""
    print(f"{title} ({counts['bank_images']} images in the bank, {counts['test_images']} test images{bad})")
    print("      k   top-1 %")
    for name, percent in metrics.items():
        print(f"{name.removeprefix('knn_'):>7}   {percent:7.2f}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="eval/knn.py",
        description="Weighted k-nearest-neighbour classification on frozen features, as in DINO and DINOv2.",
        epilog="Data, sizes and k default to the run's config (eval.train or data.train, eval.test, eval.size, …).",
    )
    add = parser.add_argument
    add("--weights", metavar="PATH", help="a run directory, one of its checkpoints, or an exported file")
    add("--step", type=int, help="which checkpoint of the run; by default the newest")
    add("--train", metavar="SPEC", help="labelled images of the memory bank, e.g. folder:PATH")
    add("--test", metavar="SPEC", help="labelled images to classify")
    add("--resize", type=int, help="shorter side before the central crop, pixels")
    add("--size", type=int, help="central crop, pixels; a multiple of the patch")
    add("--batch", type=int, help="images that go through the backbone at once")
    add("--k", type=int, nargs="+", help="neighbours that vote, e.g. 1 10 20")
    add("--temperature", type=float, help="temperature of the votes")
    add("--max-train", type=int, help="use only this many images of the bank; 0: all")
    add("--max-test", type=int, help="use only this many test images; 0: all")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute (default: auto)")
    add("--workers", type=int, default=0, help="processes that decode images (default: 0, in this one)")
    add("--output", metavar="DIR", help="where to write results.json; by default RUN/eval/step_…/knn")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--pixels", action="store_true", help="classify by raw pixels instead: the baseline to beat")
    which.add_argument("--untrained", action="store_true", help="classify by the run's backbone before its first step")
    return parser


def main() -> int:
    """Run the command line."""
    run(_parser().parse_args())
    return 0


if __name__ == "__main__":
    run_cli(main)
