"""Metrics of dense tasks and of retrieval, in float64: mean IoU, errors of depth, average precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

DEPTH_METRICS = ("rmse", "abs_rel", "delta_1", "delta_2", "delta_3", "log10", "silog")


def confusion_matrix(truth: NDArray[np.integer], predicted: NDArray[np.integer], classes: int) -> NDArray[np.int64]:
    """Return the counts (classes, classes) of pixels by true class (row) and predicted class (column).

    Pixels whose true class is not below ``classes`` (void) do not count.
    """
    known = (truth >= 0) & (truth < classes)
    cells = truth[known].astype(np.int64) * classes + predicted[known]
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def segmentation_metrics(confusion: NDArray[np.int64]) -> dict[str, float]:
    """Return percentages: ``miou``, ``accuracy`` of pixels, ``mean_accuracy`` of classes, from a confusion matrix.

    IoU of a class is true positives / (true positives + false positives + false negatives) over all images. A class
    that neither occurs nor is predicted has none and is left out of the mean.
    """
    iou = intersection_over_union(confusion)
    hits, occurring = np.diag(confusion), confusion.sum(axis=1)
    with np.errstate(invalid="ignore"):
        recall = hits / occurring
    total = int(confusion.sum())
    return {
        "miou": _mean(iou),
        "accuracy": 100 * float(hits.sum()) / total if total else float("nan"),
        "mean_accuracy": _mean(recall),
    }


def intersection_over_union(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return each class's IoU in [0, 1], NaN where the class neither occurs nor is predicted."""
    hits = np.diag(confusion).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return hits / (confusion.sum(axis=0) + confusion.sum(axis=1) - hits)


def _mean(values: NDArray[np.float64]) -> float:
    return 100 * float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def depth_metrics(
    truth: NDArray[np.floating], predicted: NDArray[np.floating], valid: NDArray[np.bool_]
) -> dict[str, float] | None:
    """Return one image's errors over its valid pixels, None where there is none (Eigen et al., arXiv 1406.2283).

    ``rmse`` in the depth's unit; ``abs_rel`` mean |p − t| / t; ``delta_n`` share of pixels with max(p/t, t/p) < 1.25ⁿ;
    ``log10`` mean |log₁₀ p − log₁₀ t|; ``silog`` 100 · standard deviation of log p − log t.
    """
    if not valid.any():
        return None
    t, p = truth[valid].astype(np.float64), predicted[valid].astype(np.float64)
    ratio, log = np.maximum(p / t, t / p), np.log(p) - np.log(t)
    return {
        "rmse": float(np.sqrt(np.mean((p - t) ** 2))),
        "abs_rel": float(np.mean(np.abs(p - t) / t)),
        **{f"delta_{n}": float(np.mean(ratio < 1.25**n)) for n in (1, 2, 3)},
        "log10": float(np.mean(np.abs(log)) / np.log(10)),
        "silog": float(100 * log.std()),
    }


def average_precision(ranking: NDArray[np.int64], positive: NDArray[np.int64], junk: NDArray[np.int64]) -> float:
    """Return the area under one query's precision–recall curve by the trapezoidal rule, NaN without positives.

    As in the revisited Oxford and Paris evaluation (arXiv 1803.11285, section 4): junk images are taken out of the
    ranking, and precision before the first positive counts as 1.

    Args:
        ranking: gallery images, the most similar first.
        positive, junk: gallery images that are right, and that do not count.
    """
    if not len(positive):
        return float("nan")
    kept = ranking[~np.isin(ranking, junk)]
    places = np.flatnonzero(np.isin(kept, positive)).astype(np.float64)
    found = np.arange(len(places), dtype=np.float64)
    before = np.where(places == 0, 1.0, found / np.maximum(places, 1))
    after = (found + 1) / (places + 1)
    return float(np.sum((before + after) / 2) / len(positive))


def revisited_map(
    rankings: NDArray[np.int64], relevance: Sequence[Mapping[str, NDArray[np.int64]]]
) -> dict[str, float]:
    """Return mean average precision, percent, as ``map_easy``, ``map_medium`` and ``map_hard``.

    Easy counts easy images as positive and hard ones as junk; medium counts both as positive; hard counts hard images
    as positive and easy ones as junk. Queries without a positive are left out; a setup without any is NaN.

    Args:
        rankings: (queries, gallery).
        relevance: per query, indices of the gallery's ``easy``, ``hard`` and ``junk`` images.
    """
    setups = {
        "map_easy": (("easy",), ("hard", "junk")),
        "map_medium": (("easy", "hard"), ("junk",)),
        "map_hard": (("hard",), ("easy", "junk")),
    }
    found = {}
    for name, (positive, junk) in setups.items():
        values = np.array(
            [
                average_precision(ranking, _union(lists, positive), _union(lists, junk))
                for ranking, lists in zip(rankings, relevance, strict=True)
            ]
        )
        found[name] = _mean(values)
    return found


def _union(lists: Mapping[str, NDArray[np.int64]], names: tuple[str, ...]) -> NDArray[np.int64]:
    return np.concatenate([np.asarray(lists.get(name, ()), np.int64) for name in names])
