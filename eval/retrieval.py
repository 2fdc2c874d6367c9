"""Instance retrieval by the cosine similarity of class tokens: mean average precision.

python eval/retrieval.py --weights model.safetensors --images folder:roxford5k/jpg --lists gnd_roxford5k.pkl
python eval/retrieval.py --weights runs/NAME --gallery folder:PATH --queries folder:PATH      # same class = relevant

Lists are those of the revisited Oxford and Paris sets (arXiv 1803.11285), as their pickle or as JSON of the same
content: ``imlist`` (gallery), ``qimlist`` (queries) and, for each query, ``gnd`` with ``easy``, ``hard`` and ``junk``
(indices of the gallery) and ``bbx`` (the part of the query image that is asked for).
"""

from __future__ import annotations

import argparse
import json
import pickle
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
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from dinov2_fsdp.config import Config
from dinov2_fsdp.data.sources import Source, open_source
from dinov2_fsdp.data.sources.listed import ListedSource
from dinov2_fsdp.data.sources.listing import printable
from dinov2_fsdp.errors import UserError, run_cli
from dinov2_fsdp.parallel.world import World
from eval import command
from eval.classes import check_sources
from eval.dense import own_share, to_input
from eval.features import (
    Extracted,
    Features,
    NotFinite,
    check_finite,
    class_token,
    extract,
    gather_rows,
    in_order,
    progress_bar,
    reduce_over_ranks,
)
from eval.metrics import average_precision, revisited_map
from eval.rows import KEPT, Rows, RowsOnDisk

_SAFE = {
    ("numpy", "ndarray"), ("numpy", "dtype"), ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"), ("_codecs", "encode"),
}  # fmt: skip


@dataclass
class Settings:
    """How images become features."""

    resize: int = 256
    """With --gallery and --queries: shorter side before the central crop, pixels."""
    size: int = 224
    """With --lists: the longer side of whole images at most; otherwise the central crop; pixels."""
    batch: int = 64
    """Images of equal size that go through the backbone at once."""
    max_train: int = 0
    """Use only this many images of the gallery; 0: all (only with --gallery)."""
    max_test: int = 0
    """Use only this many queries; 0: all (only with --queries)."""


@dataclass
class Lists:
    """Names of the gallery's images and of the queries, and for each query its box (or None) and relevance."""

    gallery: list[str]
    queries: list[str]
    boxes: list[tuple[float, float, float, float] | None]
    relevance: list[dict[str, NDArray[np.int64]]]


def read_lists(file: str | Path) -> Lists:
    """Return the lists in a ``.pkl`` of the revisited sets, or in JSON of the same content.

    Raises:
        UserError: the file is missing, holds something else, or an index lies outside the gallery.
    """
    path = Path(file)
    try:
        if path.suffix == ".pkl":
            with path.open("rb") as stream:
                content = _Unpickler(stream, encoding="latin1").load()
        else:
            content = json.loads(path.read_text())
        boxes = [tuple(map(float, entry["bbx"])) if entry.get("bbx") is not None else None for entry in content["gnd"]]
        relevance = [
            {name: np.array(entry.get(name, []), np.int64).reshape(-1) for name in ("easy", "hard", "junk")}
            for entry in content["gnd"]
        ]
        lists = Lists(list(content["imlist"]), list(content["qimlist"]), boxes, relevance)  # type: ignore[arg-type]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"--lists {file} cannot be read as lists of the revisited Oxford and Paris form: {error}\n"
            "expected imlist, qimlist and gnd (easy, hard, junk, bbx), as their .pkl or as JSON"
        ) from None
    if len(lists.queries) != len(relevance) or not lists.queries or not lists.gallery:
        raise UserError(
            f"--lists {file} has {len(lists.gallery)} gallery images, {len(lists.queries)} queries and "
            f"{len(relevance)} entries of gnd; expected an entry for each query, and images"
        )
    for query, entry in zip(lists.queries, relevance, strict=True):
        for name, indices in entry.items():
            if len(indices) and not 0 <= indices.min() <= indices.max() < len(lists.gallery):
                raise UserError(f"--lists {file}: {name} of {query} points outside the {len(lists.gallery)} images")
    return lists


class _Unpickler(pickle.Unpickler):
    """Reads lists, numbers and arrays only: a stranger's pickle must not run anything."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _SAFE:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no list, number or array")


def find_images(source: Source, names: Sequence[str]) -> list[int]:
    """Return the indices of the images with these names (without folder and extension).

    Raises:
        UserError: one is missing.
    """
    assert isinstance(source, ListedSource)
    known = {Path(printable(source.listing.names[index])).stem: index for index in range(len(source))}
    missing = [name for name in names if Path(name).stem not in known]
    if missing:
        raise UserError(
            f"'{source.spec}' lacks {len(missing)} of {len(names)} images of the lists, the first is {missing[0]}"
        )
    return [known[Path(name).stem] for name in names]


def fit_inside(image: Image.Image, longest: int, patch: int) -> Image.Image:
    """Return the whole image, its longer side about ``longest`` pixels, each side a multiple of the patch."""
    scale = longest / max(image.size)
    width, height = (max(patch, round(side * scale / patch) * patch) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def whole_image_features(
    features: Features,
    source: Source,
    indices: Sequence[int],
    boxes: Sequence[tuple[float, float, float, float] | None],
    size: int,
    patch: int,
    world: World,
    title: str = "",
    partial: Path | None = None,
    key: dict[str, Any] | None = None,
) -> Tensor:
    """Return the class tokens (n, D) of images of any shape, one at a time, spread over ranks; the same on all.

    Args:
        boxes: left, top, right, bottom of the part that is looked at, pixels; None: all of it.
        partial, key: see :func:`eval.features.extract`.

    Raises:
        BadImage: an image cannot be read; the lists count on every one of them.
    """
    share = list(own_share(len(indices), world.rank, world.size))
    store, start = Rows(len(share)), 0
    if partial is not None:
        images = {"images": source.fingerprint, "chosen": [*map(int, indices)], "boxes": [*boxes], "size": size}
        store = RowsOnDisk(len(share), partial / f"rank_{world.rank}_of_{world.size}", {**images, **(key or {})})
        start = int(reduce_over_ranks(torch.tensor(store.done()), world.size, world.device, dist.ReduceOp.MIN))
    with torch.no_grad(), progress_bar(title if world.rank == 0 else "", len(share), start) as advance:
        for number, place in enumerate(share[start:], start):
            advance(1)
            pixels = torch.zeros(1, 3, patch, patch, device=world.device)
            if place is not None:  # others still have one, and a sharded backbone's forward is collective
                image, box = source.image(indices[place]), boxes[place]
                image = image if box is None else image.crop(tuple(map(round, box)))  # type: ignore[arg-type]
                pixels = torch.from_numpy(to_input(fit_inside(image, size, patch)))[None].to(world.device)
            row = class_token(features(pixels)).float().cpu()
            store.write(number, row, np.full(1, KEPT, np.uint8))
    store.save()
    assert store.rows is not None
    own = store.rows[: sum(place is not None for place in share)]
    everyone = gather_rows(own, world.size, world.device)
    order = np.concatenate([np.arange(rank, len(indices), world.size) for rank in range(world.size)])
    return everyone[torch.from_numpy(np.argsort(order))]


def rank_gallery(queries: Tensor, gallery: Tensor) -> NDArray[np.int64]:
    """Return, for each query (m, D), the gallery's indices (m, n), the most similar by cosine first; ties by index."""
    similarity = normalize(queries.double(), dim=1) @ normalize(gallery.double(), dim=1).T
    return (-similarity).argsort(dim=1, stable=True).numpy()


def map_by_class(queries: Tensor, query_labels: Tensor, gallery: Tensor, labels: Tensor, at_once: int = 256) -> float:
    """Return the mean average precision, percent, where the gallery's images of the query's class are relevant."""
    values: list[float] = []
    nothing = np.empty(0, np.int64)
    for start in range(0, len(queries), at_once):
        part = slice(start, start + at_once)
        rankings = rank_gallery(queries[part], gallery)
        for ranking, label in zip(rankings, query_labels[part].tolist(), strict=True):
            values.append(average_precision(ranking, (labels == label).nonzero()[:, 0].numpy(), nothing))
    found = np.array(values)
    return 100 * float(np.nanmean(found)) if np.isfinite(found).any() else float("nan")


def run(arguments: argparse.Namespace) -> Path | None:
    """Evaluate as the command line says, print a line and return the file of the results (None: nowhere to write)."""
    with command.open_subject(arguments) as subject:
        config = subject.config
        settings = command.read_settings(arguments, Settings(), config)
        command.require_positive(settings, "resize", "size", "batch", zero=("max_train", "max_test"))
        if (arguments.lists is None) != (arguments.images is None):
            raise UserError(
                "--lists FILE and --images SPEC go together; without both, --gallery and --queries are used"
            )
        measure = _by_class if arguments.lists is None else _by_lists
        return measure(arguments, subject, settings)


def _by_lists(arguments: argparse.Namespace, subject: command.Subject, settings: Settings) -> Path | None:
    lists = read_lists(arguments.lists)
    source = open_source(arguments.images, subject.config.data.cache if subject.config else None)
    gallery, queries = find_images(source, lists.gallery), find_images(source, lists.queries)
    specs = {"train": arguments.images, "test": str(arguments.lists)}
    # All that the lists name is used, whatever limits a run's evaluations have.
    settings = replace(settings, max_train=0, max_test=0)
    sizes = len(gallery), len(queries)
    evaluation = command.Evaluation(subject, "retrieval", settings, specs, sizes, arguments.output)
    features = subject.features(0)
    found = []
    for indices, boxes, title in (
        (gallery, [None] * len(gallery), "gallery"),
        (queries, lists.boxes, "queries"),
    ):
        found.append(
            whole_image_features(
                features, source, indices, boxes, settings.size, subject.patch, subject.world, title,
                evaluation.partial(title), subject.key(features="class token"),
            )
        )  # fmt: skip
    _check(found)
    metrics = revisited_map(rank_gallery(found[1], found[0]), lists.relevance)
    if subject.world.rank == 0:
        print(f"retrieval of {subject}: " + ", ".join(f"{name} {value:.2f} %" for name, value in metrics.items()))
    counts = {"gallery_images": len(gallery), "queries": len(queries)}
    return evaluation.finish("map_medium", metrics, data=counts)


def _by_class(arguments: argparse.Namespace, subject: command.Subject, settings: Settings) -> Path | None:
    gallery, queries = command.open_both(subject.config, arguments.gallery, arguments.queries, "retrieval")
    command.check_sizes(settings)
    check_sources(gallery, queries)
    specs = {"train": gallery.spec, "test": queries.spec}
    evaluation = command.Evaluation(
        subject, "retrieval", settings, specs, (len(gallery), len(queries)), arguments.output
    )
    features, world = subject.features(settings.size), subject.world
    found: list[Extracted] = []
    for source, limit, title in ((gallery, settings.max_train, "gallery"), (queries, settings.max_test, "queries")):
        share = extract(
            features, source, resize=settings.resize, size=settings.size, batch=settings.batch, device=world.device,
            rank=world.rank, world_size=world.size, workers=arguments.workers, max_images=limit, progress=title,
            partial=evaluation.partial(title), key=subject.key(features="class token"),
        )  # fmt: skip
        check_finite((share,), world.size, world.device)
        found.append(in_order(share, world.size, world.device))
    first, second = found
    value = map_by_class(second.features, second.labels, first.features, first.labels)
    if world.rank == 0:
        print(f"retrieval of {subject}: mAP {value:.2f} % (same class = relevant)")
    counts = {"gallery_images": len(first.labels), "queries": len(second.labels)}
    return evaluation.finish("map", {"map": value}, data=counts)


def online_retrieval(
    features: Features, config: Config, rank: int, world_size: int, device: torch.device
) -> dict[str, float]:
    """Return ``{"retrieval_map": percent}`` for the backbone in training; all ranks call this together.

    Queries are ``eval.test``, the gallery ``eval.train``; images of the same class are relevant. Features that are not
    finite give NaN.
    """
    c = config.eval
    gallery, queries = command.open_both(config, None, None, "retrieval")
    check_sources(gallery, queries)
    found = []
    for source, limit in ((gallery, c.max_train), (queries, c.max_test)):
        share = extract(
            features, source, resize=c.resize, size=c.size, batch=c.batch, device=device, rank=rank,
            world_size=world_size, workers=config.data.workers, max_images=limit,
        )  # fmt: skip
        try:
            check_finite((share,), world_size, device)
        except NotFinite:
            return {"retrieval_map": float("nan")}
        found.append(in_order(share, world_size, device))
    first, second = found
    return {"retrieval_map": map_by_class(second.features, second.labels, first.features, first.labels)}


def _check(parts: Sequence[Tensor]) -> None:
    if not all(part.isfinite().all() for part in parts):
        raise UserError("the features are not finite: the run diverged; use an earlier --step")


def _parser() -> argparse.ArgumentParser:
    parser = command.build_parser(
        "eval/retrieval.py", "Retrieval by the similarity of class tokens: mean average precision.", Settings
    )
    add = parser.add_argument
    add("--images", metavar="SPEC", help="all images of the lists, e.g. folder:roxford5k/jpg")
    add("--lists", metavar="FILE", help="gallery, queries and relevance, e.g. gnd_roxford5k.pkl, or JSON")
    command.add_data(
        parser,
        "instead of lists: labelled images to find; the same class is relevant",
        "instead of lists: labelled images to ask with",
        names=("gallery", "queries"),
    )
    return parser


def main() -> int:
    """Run the command line."""
    run(_parser().parse_args())
    return 0


if __name__ == "__main__":
    run_cli(main)
