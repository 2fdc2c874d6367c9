"""Linear probe: linear classifiers on frozen features, for every learning rate, depth and pooling in one pass.

python eval/linear.py --weights runs/NAME
python eval/linear.py --weights model.safetensors --train imagenet:ROOT --test imagenet:ROOT:val \\
    --also v2=folder:PATH a=folder:PATH r=folder:PATH real=real:PATH/real.json

The protocol is that of DINOv2 (arXiv 2304.07193, section 7.1, and its released code) but for the choice of the head,
which is made on images held out of the training set; the published choice, on the test set, is reported beside it.
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
from numpy.typing import NDArray
from torch import Tensor

from dinov2_fsdp.config import Config
from dinov2_fsdp.data.sources import Source, open_source
from dinov2_fsdp.errors import UserError, run_cli
from dinov2_fsdp.parallel.world import World
from dinov2_fsdp.rng import generator
from eval import command
from eval.classes import check_sources, classes_in, number_of_classes, real_labels
from eval.features import (
    Extracted,
    Features,
    NotFinite,
    check_finite,
    class_tokens_and_mean,
    extract,
    in_order,
    progress_bar,
    reduce_over_ranks,
    subset,
)
from eval.heads import Head, LinearHeads
from eval.training_rows import RandomCrops, from_features, from_random_crops

PUBLISHED_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)


@dataclass
class Settings:
    """How the heads are trained and chosen; the defaults are the published ones on eight GPUs."""

    resize: int = 256
    """Shorter side before the central crop of images that are classified, pixels."""
    size: int = 224
    """Crop, pixels; a multiple of the patch."""
    batch: int = 64
    """Images per process that go through the backbone at once while features are extracted."""
    rates: tuple[float, ...] = PUBLISHED_RATES
    """Learning rates, each multiplied by train-batch / 256."""
    blocks: tuple[int, ...] = (1, 4)
    """Class tokens of how many last blocks a head reads."""
    train_batch: int = 1024
    """Images of a step of SGD, over all processes."""
    epochs: int = 10
    """Epochs of epoch-length steps."""
    epoch_length: int = 1250
    """Steps of an epoch; 0: one pass over the training images."""
    augment: bool = True
    """Train on random crops and flips, each step through the backbone; otherwise on features of central crops,
    extracted once."""
    held_out: float = 0.1
    """Share of the training images that heads do not see and are chosen on."""
    max_train: int = 0
    """Use only this many training images; 0: all."""
    max_test: int = 0
    """Use only this many test images; 0: all."""
    seed: int = 0
    """Seed of the heads, the order of images, the crops and the held-out split."""


@dataclass
class TestSet:
    """Features of images, this rank's share, and which answers are right.

    ``answers`` holds, for each row, the right classes of the training set, none where the image does not count;
    ``columns`` the classes that may be answered, None for all.
    """

    name: str
    rows: Tensor
    answers: list[NDArray[np.int64]]
    columns: NDArray[np.int64] | None = None

    def right(self, logits: Tensor) -> int:
        """Return for how many rows the largest of the logits (n, classes) is a right class."""
        if self.columns is None:
            predicted = logits.argmax(dim=1).cpu().numpy()
        else:
            columns = torch.from_numpy(self.columns)
            predicted = self.columns[logits[:, columns.to(logits.device)].argmax(dim=1).cpu().numpy()]
        return sum(int(answer in allowed) for answer, allowed in zip(predicted, self.answers, strict=True))


def inputs_of(blocks: Sequence[int], dim: int) -> dict[str, tuple[int, int]]:
    """Return the columns of :func:`eval.features.class_tokens_and_mean` that each kind of head reads, by its name."""
    deepest = max(blocks)
    end = deepest * dim
    found = {}
    for count in blocks:
        start = (deepest - count) * dim
        found[f"{count} blocks, cls"] = (start, end)
        found[f"{count} blocks, cls+mean"] = (start, end + dim)
    return found


def hold_out(indices: NDArray[np.int64], labels: NDArray[np.int64], share: float, seed: int) -> NDArray[np.bool_]:
    """Return which of ``indices`` are held out: a random ``share``, spread evenly over the classes.

    Raises:
        UserError: nothing would be left on one of the two sides.
    """
    count = round(share * len(indices))
    if not 0 < count < len(indices):
        raise UserError(
            f"--held-out {share:g} of {len(indices)} training images leaves one side without images; "
            "use a share like 0.1, and more images"
        )
    order = generator(seed, "held-out split").permutation(len(indices))
    order = order[np.argsort(labels[indices[order]], kind="stable")]
    held = np.zeros(len(indices), bool)
    held[order[np.arange(count) * len(indices) // count]] = True
    return held


def probe(
    features: Features,
    train: Source,
    test: Source,
    also: Sequence[tuple[str, Source | Path]],
    settings: Settings,
    world: World,
    *,
    workers: int = 0,
    progress: bool = True,
    partial: Path | None = None,
    key: dict[str, Any] | None = None,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Return (metrics, what else was found) of a linear probe; all ranks call this and get the same answer.

    ``top1`` and ``NAME/top1`` are percentages of the head chosen on held-out images, ``top1_chosen_on_test`` that of
    the head that is best on the test set.

    Args:
        features: frozen forward with the settings' last blocks.
        also: more test sets by name: a labelled source, or the file of ImageNet-ReaL's labels of ``test``.
        partial: folder for what an interrupted probe goes on from; ``key``: what it depends on.
    """
    assert train.labels is not None
    classes = number_of_classes(train)
    chosen = subset(train, settings.max_train)
    held = hold_out(chosen, train.labels, settings.held_out, settings.seed)

    def look(source: Source, name: str, indices: NDArray[np.int64]) -> Extracted:
        return extract(
            features, source, resize=settings.resize, size=settings.size, batch=settings.batch, device=world.device,
            rank=world.rank, world_size=world.size, workers=workers, chosen=indices, pick=class_tokens_and_mean,
            progress=name if progress else "", partial=None if partial is None else partial / name, key=key,
        )  # fmt: skip

    with torch.no_grad():
        blank = torch.zeros(1, 3, settings.size, settings.size, device=world.device)
        width = class_tokens_and_mean(features(blank)).shape[1]
    inputs = inputs_of(settings.blocks, width // (max(settings.blocks) + 1))
    steps = settings.epochs * (settings.epoch_length or math.ceil((~held).sum() / settings.train_batch))
    rates = [rate * settings.train_batch / 256 for rate in settings.rates]
    heads = LinearHeads(
        inputs, rates, classes, steps, seed=settings.seed, rank=world.rank, world_size=world.size, device=world.device
    )
    tag = f"{settings} {key} {train.fingerprint}"
    if partial is not None:
        heads.load(partial, tag)
    left = range(heads.step, steps)
    if settings.augment:
        held_rows = look(train, "held-out images", chosen[held])
        check_finite((held_rows,), world.size, world.device)
        crops = RandomCrops(
            train, chosen[~held], settings.train_batch, settings.size, settings.seed, world.rank, world.size
        )
        batches = from_random_crops(features, class_tokens_and_mean, crops, left, settings.batch, world, workers)
    else:
        whole = in_order(look(train, "training images", chosen), world.size, world.device)
        check_finite((whole,), 1, world.device)
        kept = held[np.isin(chosen, whole.indices.numpy())]
        share = torch.from_numpy(np.flatnonzero(kept)[world.rank :: world.size])
        held_rows = Extracted(whole.features[share], whole.labels[share], whole.indices[share], whole.bad)
        batches = from_features(whole, np.flatnonzero(~kept), settings.seed, settings.train_batch, left)
    every = settings.epoch_length or max(1, steps // settings.epochs)
    with progress_bar("steps of the heads" if progress and world.rank == 0 else "", steps, heads.step, "steps") as bar:
        for rows, labels in batches:
            heads.train_step(rows, labels)
            bar(1)
            if partial is not None and heads.step % every == 0:
                heads.save(partial, tag)
    test_rows = look(test, "test images", subset(test, settings.max_test))
    check_finite((test_rows,), world.size, world.device)
    sets = [_labelled("held_out", held_rows), _labelled("test", test_rows)]
    for name, where in also:
        if isinstance(where, Path):
            sets.append(_real(name, test_rows, real_labels(where, test, classes)))
            continue
        mapping = classes_in(train, where)
        other = look(where, f"images of {name}", subset(where, settings.max_test))
        answers = [mapping[[label]] for label in other.labels.tolist()]
        sets.append(TestSet(name, other.features, answers, None if len(mapping) == classes else mapping))
    return _choose(heads, sets, settings, world)


def _choose(
    heads: LinearHeads, sets: list[TestSet], settings: Settings, world: World
) -> tuple[dict[str, float], dict[str, Any]]:
    right = torch.zeros(len(heads.heads), len(sets), dtype=torch.int64)
    for number, (head, weight, bias) in enumerate(heads.each()):
        first, end = heads.inputs[head.input]
        for place, tested in enumerate(sets):
            for start in range(0, len(tested.rows), 4096):
                part = slice(start, start + 4096)
                logits = tested.rows[part, first:end].to(weight.device) @ weight + bias
                within = replace(tested, rows=tested.rows[part], answers=tested.answers[part])
                right[number, place] += within.right(logits)
    counted = torch.tensor([sum(len(answer) > 0 for answer in tested.answers) for tested in sets])
    right = reduce_over_ranks(right, world.size, world.device, dist.ReduceOp.SUM)
    counted = reduce_over_ranks(counted, world.size, world.device, dist.ReduceOp.SUM)
    percent = 100 * right.double() / counted.clamp(min=1)
    # Of equally good heads the first: fewer inputs, lower learning rate.
    best, best_on_test = int(percent[:, 0].argmax()), int(percent[:, 1].argmax())
    metrics = {
        "top1": float(percent[best, 1]),
        "top1_chosen_on_test": float(percent[best_on_test, 1]),
        "top1_held_out": float(percent[best, 0]),
    }
    metrics |= {f"{tested.name}/top1": float(percent[best, 2 + n]) for n, tested in enumerate(sets[2:])}
    scale = settings.train_batch / 256
    listing = [
        {**_describe(head, scale), "held_out": round(float(row[0]), 3), "test": round(float(row[1]), 3)}
        for head, row in zip(heads.heads, percent, strict=True)
    ]
    found = {
        "head": listing[best],
        "head_chosen_on_test": listing[best_on_test],
        "heads": listing,
        "data": {
            "held_out_images": int(counted[0]),
            "test_images": int(counted[1]),
            **{f"{tested.name}_images": int(counted[2 + n]) for n, tested in enumerate(sets[2:])},
        },
    }
    return metrics, found


def _describe(head: Head, scale: float) -> dict[str, Any]:
    blocks, _, pooling = head.input.partition(" blocks, ")
    return {"blocks": int(blocks), "pooling": pooling, "rate": float(f"{head.rate / scale:.6g}")}


def _labelled(name: str, rows: Extracted) -> TestSet:
    return TestSet(name, rows.features, [np.array([label]) for label in rows.labels.tolist()])


def _real(name: str, test: Extracted, sets: list[NDArray[np.int64]]) -> TestSet:
    answers = [sets[index] for index in test.indices.tolist()]
    return TestSet(name, test.features, answers)


# ---------------------------------------------------------------------------------------------------------------------
# During training, and the command.


def online_linear(
    features: Features, config: Config, rank: int, world_size: int, device: torch.device
) -> dict[str, float]:
    """Return ``{"linear_top1": percent, …}`` for the backbone in training; all ranks call this and get the same answer.

    Heads read the last block and are trained on features of central crops: one pass over the images, then a second or
    two of SGD, spread over ranks. Features that are not finite give NaN.

    Raises:
        UserError: no test set is configured, data are unlabelled, or the classes differ.
    """
    c = config.eval
    settings = Settings(
        c.resize, c.size, c.batch, blocks=(1,), train_batch=256, epoch_length=0, augment=False,
        max_train=c.max_train, max_test=c.max_test, seed=config.seed,
    )  # fmt: skip
    train, test = command.open_both(config, None, None, "the linear probe")
    check_sources(train, test)
    world = World(rank, world_size, rank, device)
    try:
        metrics, _ = probe(features, train, test, (), settings, world, workers=config.data.workers, progress=False)
    except NotFinite:
        metrics = dict.fromkeys(("top1", "top1_chosen_on_test", "top1_held_out"), float("nan"))
    return {f"linear_{name}": value for name, value in metrics.items()}


def open_also(words: Sequence[str], cache: str | None) -> list[tuple[str, Source | Path]]:
    """Return the further test sets that ``NAME=SPEC`` words name; ``NAME=real:FILE`` is a file of labels.

    Raises:
        UserError: a word is not of that form, or what it names cannot be opened.
    """
    found: list[tuple[str, Source | Path]] = []
    for word in words:
        name, equals, spec = word.partition("=")
        if not equals or not name or not spec:
            raise UserError(f"--also {word} is not of the form NAME=SPEC, e.g. v2=folder:PATH or real=real:real.json")
        if spec.startswith("real:"):
            file = Path(spec.removeprefix("real:"))
            if not file.is_file():
                raise UserError(f"--also {word}: {file} does not exist")
            found.append((name, file))
        else:
            found.append((name, open_source(spec, cache)))
    return found


def check(train: Source, test: Source, also: Sequence[tuple[str, Source | Path]], settings: Settings) -> None:
    """Refuse what cannot be evaluated, before any image is read. Raises :class:`UserError`."""
    command.check_sizes(settings)
    command.require_positive(
        settings, "rates", "blocks", "train_batch", "epochs", zero=("epoch_length", "max_train", "max_test", "seed")
    )
    check_sources(train, test)
    classes = number_of_classes(train)
    assert train.labels is not None
    hold_out(subset(train, settings.max_train), train.labels, settings.held_out, settings.seed)
    for _, where in also:
        if isinstance(where, Path):
            real_labels(where, test, classes)
        else:
            classes_in(train, where)


def run(arguments: argparse.Namespace) -> Path | None:
    """Evaluate as the command line says, print a table and return the file of the results (None: nowhere to write)."""
    with command.open_subject(arguments) as subject:
        settings = command.read_settings(arguments, Settings(), subject.config)
        train, test = command.open_both(subject.config, arguments.train, arguments.test, "the linear probe")
        also = open_also(arguments.also, subject.config.data.cache if subject.config else None)
        blocks = subject.last_blocks(max(settings.blocks, default=1))
        # A backbone of fewer blocks has no heads on more.
        settings = replace(settings, blocks=tuple(dict.fromkeys(min(count, len(blocks)) for count in settings.blocks)))
        check(train, test, also, settings)
        features = subject.features(settings.size, blocks)
        specs = {"train": train.spec, "test": test.spec, "also": dict(word.split("=", 1) for word in arguments.also)}
        # A limit on test images holds for each of these sets.
        largest = max([len(test), *(len(source) for _, source in also if not isinstance(source, Path))])
        evaluation = command.Evaluation(subject, "linear", settings, specs, (len(train), largest), arguments.output)
        metrics, found = probe(
            features, train, test, also, settings, subject.world, workers=arguments.workers,
            partial=evaluation.partial(""), key=subject.key(blocks=len(blocks)),
        )  # fmt: skip
        if subject.world.rank == 0:
            head, other = found["head"], found["head_chosen_on_test"]
            print(f"linear probe of {subject}: {len(found['heads'])} heads")
            print(f"  top-1 {metrics['top1']:6.2f} %  chosen on held-out images: {_words(head)}")
            print(f"  top-1 {metrics['top1_chosen_on_test']:6.2f} %  chosen on the test set: {_words(other)}")
            for name, value in metrics.items():
                if "/" in name:
                    print(f"  {name} {value:6.2f} %")
        return evaluation.finish("top1", metrics, **found)


def _words(head: dict[str, Any]) -> str:
    return f"{head['blocks']} blocks, {head['pooling']}, rate {head['rate']:g}"


def _parser() -> argparse.ArgumentParser:
    parser = command.build_parser("eval/linear.py", "Linear probe on frozen features, as in DINOv2.", Settings)
    command.add_data(parser, "labelled images to learn from, e.g. folder:PATH", "labelled images to classify")
    parser.add_argument(
        "--also", metavar="NAME=SPEC", nargs="+", default=[], help="more test sets; NAME=real:FILE for ImageNet-ReaL"
    )
    return parser


def main() -> int:
    """Run the command line."""
    run(_parser().parse_args())
    return 0


if __name__ == "__main__":
    run_cli(main)
