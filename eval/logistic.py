"""Multinomial logistic regression on frozen features: an L2 path over 45 values of C, by L-BFGS in float64.

python eval/logistic.py --weights runs/NAME
python eval/logistic.py --weights model.safetensors --train folder:PATH --test folder:PATH

The protocol is DINOv2's (arXiv 2304.07193, section 7.1; released code): 45 values of C from 1e-6 to 1e5, the best of
them on a tenth of the training images, then once more on all of them. The objective is scikit-learn's,
C · Σ cross-entropy + ‖W‖² / 2, with a bias that is not penalised.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import log_softmax

from dinov2_fsdp.config import Config
from dinov2_fsdp.data.sources import Source
from dinov2_fsdp.errors import UserError, run_cli
from dinov2_fsdp.parallel.world import World
from eval import command
from eval.classes import check_sources, number_of_classes
from eval.features import (
    Extracted,
    Features,
    NotFinite,
    check_finite,
    class_token,
    extract,
    progress_bar,
    reduce_over_ranks,
    subset,
)
from eval.linear import hold_out
from eval.resumption import file_of

_HISTORY = 20
_MAGNIFIED = 1e10
"""Factor on the objective: torch's solver forgets curvature whose measure is below 1e-10."""


@dataclass
class Settings:
    """Which values of C are tried and how exactly each is solved; the defaults are the published ones."""

    resize: int = 224
    """Shorter side before the central crop, pixels; not below the size."""
    size: int = 224
    """Central crop, pixels; a multiple of the patch."""
    batch: int = 64
    """Images per process that go through the backbone at once."""
    c_powers: tuple[float, float] = (-6.0, 5.0)
    """Powers of ten of the smallest and the largest C."""
    c_values: int = 45
    """How many values of C, evenly spaced in their powers."""
    max_iterations: int = 1000
    """Iterations of L-BFGS for each C."""
    tolerance: float = 1e-12
    """The solver stops where no entry of the mean loss's gradient is larger."""
    held_out: float = 0.1
    """Share of the training images that C is chosen on."""
    max_train: int = 0
    """Use only this many training images; 0: all."""
    max_test: int = 0
    """Use only this many test images; 0: all."""
    seed: int = 0
    """Seed of the held-out split."""


@dataclass
class Classifier:
    """Weights (classes, D) and biases (classes), float64, and how many iterations found them."""

    weight: Tensor
    bias: Tensor
    iterations: int = 0

    def predict(self, rows: Tensor) -> Tensor:
        """Return the classes (n,) of ``rows`` (n, D)."""
        return (rows.to(self.weight) @ self.weight.T + self.bias).argmax(dim=1)


def fit(
    rows: Tensor,
    labels: Tensor,
    classes: int,
    c: float,
    *,
    start: Classifier | None = None,
    max_iterations: int = 1000,
    tolerance: float = 1e-12,
    world_size: int = 1,
) -> Classifier:
    """Return the minimiser of C · Σ cross-entropy + ‖W‖² / 2 over all ranks' rows.

    L-BFGS with a line search by the strong Wolfe conditions. Sums over rows are sums over ranks, so all ranks take the
    same steps and return the same classifier.

    Args:
        rows: (n, D) float64, this rank's share. labels: (n,) int64.
        start: where the search begins; by default at zero.
    """
    device = rows.device
    total = torch.tensor(float(len(rows)), device=device)
    if world_size > 1:
        dist.all_reduce(total)
    # Divided by the number of rows and by C: the mean loss has the scale of one row whatever C is.
    decay = 1.0 / (c * float(total))
    # The solver moves W / scale, whose curvature is near one for a small C too.
    scale = (1.0 + decay) ** -0.5
    weight = torch.zeros(classes, rows.shape[1], dtype=torch.float64, device=device)
    bias = torch.zeros(classes, dtype=torch.float64, device=device)
    if start is not None:
        weight.copy_(start.weight / scale)
        bias.copy_(start.bias)
    weight.requires_grad_()
    bias.requires_grad_()
    solver = torch.optim.LBFGS(
        [weight, bias], lr=1.0, max_iter=max_iterations, max_eval=2 * max_iterations,
        tolerance_grad=_MAGNIFIED * tolerance, tolerance_change=1e-16, history_size=_HISTORY,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        actual = scale * weight.detach()
        log_probabilities = log_softmax(rows @ actual.T + bias.detach(), dim=1)
        here = torch.arange(len(labels), device=device)
        loss = -log_probabilities[here, labels].sum()
        residual = log_probabilities.exp_()
        residual[here, labels] -= 1
        packed = torch.cat([(residual.T @ rows).flatten(), residual.sum(dim=0), loss[None]])
        if world_size > 1:
            dist.all_reduce(packed)
        packed /= total
        split = weight.numel()
        weight.grad = _MAGNIFIED * scale * (packed[:split].view_as(weight) + decay * actual)
        bias.grad = _MAGNIFIED * packed[split:-1]
        return _MAGNIFIED * (packed[-1] + 0.5 * decay * actual.square().sum())

    solver.step(closure)
    iterations = int(solver.state[weight].get("n_iter", 0))
    return Classifier(scale * weight.detach(), bias.detach(), iterations)


def path(
    rows: Tensor,
    labels: Tensor,
    classes: int,
    settings: Settings,
    world_size: int = 1,
    advance: Callable[[int], None] = lambda _: None,
    kept: Path | None = None,
    rank: int = 0,
) -> list[tuple[float, Classifier]]:
    """Return (C, classifier) for all values of C, rising; each search begins where the one before it ended.

    Args:
        kept: folder of the classifiers that an interrupted path goes on from; rank 0 writes them.
    """
    values = [float(10**power) for power in np.linspace(*settings.c_powers, settings.c_values)]
    found = list(zip(values, _kept_classifiers(kept, rows.device, world_size), strict=False))
    advance(len(found))
    for c in values[len(found) :]:
        classifier = fit(
            rows, labels, classes, c, start=found[-1][1] if found else None, world_size=world_size,
            max_iterations=settings.max_iterations, tolerance=settings.tolerance,
        )  # fmt: skip
        if kept is not None and rank == 0:
            _keep(classifier, kept, len(found))
        found.append((c, classifier))
        advance(1)
    return found


def _keep(classifier: Classifier, folder: Path, number: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / ".classifier"
    tensors = {"weight": classifier.weight, "bias": classifier.bias}
    save_file({**tensors, "iterations": torch.tensor(classifier.iterations)}, draft)
    draft.replace(folder / f"{number}.safetensors")


def _kept_classifiers(folder: Path | None, device: torch.device, world_size: int) -> list[Classifier]:
    """Return the classifiers of a path's first values of C that all ranks see in ``folder``."""
    if folder is None:
        return []
    there = next(number for number in itertools.count() if not (folder / f"{number}.safetensors").is_file())
    count = int(reduce_over_ranks(torch.tensor(there), world_size, device, dist.ReduceOp.MIN))
    found = [load_file(folder / f"{number}.safetensors", str(device)) for number in range(count)]
    return [Classifier(entry["weight"], entry["bias"], int(entry["iterations"])) for entry in found]


def regress(
    features: Features,
    train: Source,
    test: Source,
    settings: Settings,
    world: World,
    *,
    workers: int = 0,
    progress: bool = True,
    partial: Path | None = None,
    key: dict[str, Any] | None = None,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Return (metrics, what else was found); all ranks call this and get the same answer.

    ``top1`` is the percentage on the test set with the C that is best on held-out images, fitted to all training
    images; ``top1_held_out`` that on the held-out images.
    """
    assert train.labels is not None
    classes = number_of_classes(train)

    def look(source: Source, name: str, limit: int) -> Extracted:
        return extract(
            features, source, resize=max(settings.resize, settings.size), size=settings.size, batch=settings.batch,
            device=world.device, rank=world.rank, world_size=world.size, workers=workers, max_images=limit,
            pick=class_token, progress=name if progress else "", partial=None if partial is None else partial / name,
            key=key,
        )  # fmt: skip

    bank = look(train, "training images", settings.max_train)
    asked = look(test, "test images", settings.max_test)
    check_finite((bank, asked), world.size, world.device)
    chosen = subset(train, settings.max_train)
    held_indices = chosen[hold_out(chosen, train.labels, settings.held_out, settings.seed)]
    held = torch.from_numpy(np.isin(bank.indices.numpy(), held_indices)).to(world.device)
    rows, labels = bank.features.to(world.device, torch.float64), bank.labels.to(world.device)

    title = "values of C" if progress and world.rank == 0 else ""
    with progress_bar(title, settings.c_values + 1, unit="fits") as advance:
        file = None if partial is None else file_of(partial, f"{settings} {key} {train.fingerprint}")
        kept = None if file is None else file.with_suffix("")
        found = path(rows[~held], labels[~held], classes, settings, world.size, advance, kept, world.rank)
        accuracies = [_percent(classifier, rows[held], labels[held], world) for _, classifier in found]
        best = int(np.argmax(accuracies))
        c, start = found[best]
        final = fit(
            rows, labels, classes, c, start=start, max_iterations=settings.max_iterations,
            tolerance=settings.tolerance, world_size=world.size,
        )  # fmt: skip
        advance(1)
    asked_rows = asked.features.to(world.device, torch.float64)
    metrics = {
        "top1": _percent(final, asked_rows, asked.labels.to(world.device), world),
        "top1_held_out": accuracies[best],
    }
    counts = torch.tensor([len(bank.labels), int(held.sum()), len(asked.labels)])
    counted = reduce_over_ranks(counts, world.size, world.device, dist.ReduceOp.SUM).tolist()
    more = {
        "c": c,
        "path": [
            {"c": value, "held_out": round(accuracy, 3), "iterations": classifier.iterations}
            for (value, classifier), accuracy in zip(found, accuracies, strict=True)
        ],
        "data": dict(zip(("train_images", "held_out_images", "test_images"), counted, strict=True)),
    }
    return metrics, more


def _percent(classifier: Classifier, rows: Tensor, labels: Tensor, world: World) -> float:
    right = (classifier.predict(rows) == labels).sum().cpu() if len(rows) else torch.tensor(0)
    counts = torch.stack([right, torch.tensor(len(rows))])
    right, total = reduce_over_ranks(counts, world.size, world.device, dist.ReduceOp.SUM).tolist()
    return 100 * right / max(total, 1)


def online_logistic(
    features: Features, config: Config, rank: int, world_size: int, device: torch.device
) -> dict[str, float]:
    """Return ``{"logistic_top1": percent, …}`` for the backbone in training; all ranks call this together.

    Nine values of C and at most 200 iterations each. Features that are not finite give NaN.

    Raises:
        UserError: no test set is configured, data are unlabelled, or the classes differ.
    """
    c = config.eval
    settings = Settings(
        c.resize, c.size, c.batch, c_powers=(-4.0, 4.0), c_values=9, max_iterations=200, tolerance=1e-6,
        max_train=c.max_train, max_test=c.max_test, seed=config.seed,
    )  # fmt: skip
    train, test = command.open_both(config, None, None, "logistic regression")
    check_sources(train, test)
    world = World(rank, world_size, rank, device)
    try:
        metrics, _ = regress(features, train, test, settings, world, workers=config.data.workers, progress=False)
    except NotFinite:
        metrics = dict.fromkeys(("top1", "top1_held_out"), float("nan"))
    return {f"logistic_{name}": value for name, value in metrics.items()}


def check(train: Source, test: Source, settings: Settings) -> None:
    """Refuse what cannot be evaluated, before any image is read. Raises :class:`UserError`."""
    command.require_positive(
        settings, "resize", "size", "batch", "c_values", "max_iterations", "tolerance",
        zero=("max_train", "max_test", "seed"),
    )  # fmt: skip
    low, high = settings.c_powers if len(settings.c_powers) == 2 else (1.0, 0.0)
    if low > high:
        raise UserError(f"--c-powers {[*settings.c_powers]} is impossible; valid: the smallest and the largest power")
    check_sources(train, test)
    number_of_classes(train)
    assert train.labels is not None
    hold_out(subset(train, settings.max_train), train.labels, settings.held_out, settings.seed)


def run(arguments: argparse.Namespace) -> Path | None:
    """Evaluate as the command line says, print a line and return the file of the results (None: nowhere to write)."""
    with command.open_subject(arguments) as subject:
        settings = command.read_settings(arguments, Settings(), subject.config)
        train, test = command.open_both(subject.config, arguments.train, arguments.test, "logistic regression")
        check(train, test, settings)
        features = subject.features(settings.size)
        specs = {"train": train.spec, "test": test.spec}
        evaluation = command.Evaluation(subject, "logistic", settings, specs, (len(train), len(test)), arguments.output)
        metrics, more = regress(
            features, train, test, settings, subject.world, workers=arguments.workers,
            partial=evaluation.partial(""), key=subject.key(features="class token"),
        )  # fmt: skip
        if subject.world.rank == 0:
            print(f"logistic regression of {subject}: top-1 {metrics['top1']:.2f} %, C = {more['c']:.3g}")
        return evaluation.finish("top1", metrics, **more)


def _parser() -> argparse.ArgumentParser:
    parser = command.build_parser(
        "eval/logistic.py", "Logistic regression on frozen features, as in DINOv2.", Settings, pixels=True
    )
    command.add_data(parser, "labelled images to learn from, e.g. folder:PATH", "labelled images to classify")
    return parser


def main() -> int:
    """Run the command line."""
    run(_parser().parse_args())
    return 0


if __name__ == "__main__":
    run_cli(main)
