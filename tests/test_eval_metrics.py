"""Metrics against scikit-learn, or against float64 written one pixel and one image at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, jaccard_score, mean_squared_error, precision_recall_curve, recall_score

from eval.metrics import average_precision, confusion_matrix, depth_metrics, revisited_map, segmentation_metrics

RNG = np.random.default_rng(0)


def test_mean_iou_is_that_of_scikit_learn() -> None:
    truth, predicted = RNG.integers(0, 6, 5000), RNG.integers(0, 6, 5000)
    predicted[:2500] = truth[:2500]
    found = segmentation_metrics(confusion_matrix(truth, predicted, 6))
    assert found["miou"] == pytest.approx(100 * jaccard_score(truth, predicted, average="macro"), abs=1e-10)
    assert found["accuracy"] == pytest.approx(100 * accuracy_score(truth, predicted), abs=1e-10)
    assert found["mean_accuracy"] == pytest.approx(100 * recall_score(truth, predicted, average="macro"), abs=1e-10)


def test_void_pixels_do_not_count() -> None:
    truth, predicted = np.array([0, 0, 1, 255, 255]), np.array([0, 1, 1, 0, 1])
    assert confusion_matrix(truth, predicted, 2).tolist() == [[1, 1], [0, 1]]


def test_iou_is_counted_over_all_images_together_and_absent_classes_are_left_out() -> None:
    first = confusion_matrix(np.array([0, 0, 0, 0]), np.array([0, 0, 0, 1]), 4)
    second = confusion_matrix(np.array([1, 1]), np.array([1, 0]), 4)
    # Class 0: 3 of 5, class 1: 1 of 3; classes 2 and 3 occur nowhere.
    assert segmentation_metrics(first + second)["miou"] == pytest.approx(100 * (3 / 5 + 1 / 3) / 2)


def test_a_class_that_is_only_predicted_counts_as_wrong() -> None:
    assert segmentation_metrics(confusion_matrix(np.array([0, 0]), np.array([0, 1]), 3))["miou"] == pytest.approx(25)


def test_depth_errors_are_those_of_their_formulas() -> None:
    truth = RNG.uniform(0.5, 9, (20, 30)).astype(np.float32)
    predicted = (truth * RNG.lognormal(0, 0.2, truth.shape)).astype(np.float32)
    valid = RNG.random(truth.shape) < 0.7
    found = depth_metrics(truth, predicted, valid)
    assert found is not None
    pairs = [(float(t), float(p)) for t, p in zip(truth[valid], predicted[valid], strict=True)]
    count = len(pairs)
    assert found["rmse"] == pytest.approx(math.sqrt(mean_squared_error(*zip(*pairs, strict=True))), rel=1e-12)
    assert found["abs_rel"] == pytest.approx(sum(abs(p - t) / t for t, p in pairs) / count, rel=1e-12)
    for power in (1, 2, 3):
        within = sum(max(p / t, t / p) < 1.25**power for t, p in pairs)
        assert found[f"delta_{power}"] == pytest.approx(within / count, rel=1e-12)
    assert found["log10"] == pytest.approx(sum(abs(math.log10(p) - math.log10(t)) for t, p in pairs) / count)
    logs = [math.log(p / t) for t, p in pairs]
    mean = sum(logs) / count
    assert found["silog"] == pytest.approx(100 * math.sqrt(sum((g - mean) ** 2 for g in logs) / count))


def test_an_image_without_valid_pixels_has_no_depth_errors() -> None:
    assert depth_metrics(np.ones((2, 2)), np.ones((2, 2)), np.zeros((2, 2), bool)) is None


# ---------------------------------------------------------------------------------------------------------------------
# Average precision.


def trapezoids(ranking: list[int], positive: set[int], junk: set[int]) -> float:
    """Return AP as the area under straight lines between (recall, precision), junk images taken out."""
    kept = [image for image in ranking if image not in junk]
    area, found, recall, precision = 0.0, 0, 0.0, 1.0
    for place, image in enumerate(kept):
        if image in positive:
            before = found / place if place else 1.0
            found += 1
            area += (before + found / (place + 1)) / 2 * (found / len(positive) - recall)
            recall, precision = found / len(positive), found / (place + 1)
    assert precision >= 0
    return area


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_is_the_area_under_the_curve_without_junk(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ranking = rng.permutation(60)
    chosen = rng.permutation(60)[:20]
    found = average_precision(ranking, chosen[:12], chosen[12:])
    expected = trapezoids(ranking.tolist(), set(chosen[:12].tolist()), set(chosen[12:].tolist()))
    assert found == pytest.approx(expected, rel=1e-12)


def test_average_precision_lies_between_the_steps_of_scikit_learns_curve() -> None:
    scores = RNG.random(200)
    relevant = RNG.random(200) < 0.2
    found = average_precision(np.argsort(-scores), np.flatnonzero(relevant), np.empty(0, np.int64))
    precision, recall, _ = precision_recall_curve(relevant, scores)
    right = float(np.sum(-np.diff(recall) * precision[:-1]))
    assert abs(found - right) < 0.05
    # The trapezoid's left corner is the precision just before each hit.
    order = np.argsort(-scores)
    hits = np.flatnonzero(relevant[order])
    left = np.mean([1.0 if place == 0 else n / place for n, place in enumerate(hits)])
    assert found == pytest.approx((right + left) / 2, rel=1e-12)


def test_easy_medium_and_hard_count_the_images_of_the_revisited_protocol() -> None:
    rankings = np.array([RNG.permutation(30) for _ in range(4)])
    relevance: list[dict[str, Any]] = []
    for query in range(4):
        images = np.random.default_rng(query).permutation(30)
        relevance.append({"easy": images[:5], "hard": images[5:9], "junk": images[9:14]})
    relevance[3]["hard"] = np.empty(0, np.int64)
    found = revisited_map(rankings, relevance)

    def mean(positive: tuple[str, ...], junk: tuple[str, ...]) -> float:
        values = []
        for ranking, lists in zip(rankings.tolist(), relevance, strict=True):
            right = {int(image) for name in positive for image in lists[name]}
            if right:
                values.append(trapezoids(ranking, right, {int(image) for name in junk for image in lists[name]}))
        return 100 * sum(values) / len(values)

    assert found["map_easy"] == pytest.approx(mean(("easy",), ("hard", "junk")), rel=1e-12)
    assert found["map_medium"] == pytest.approx(mean(("easy", "hard"), ("junk",)), rel=1e-12)
    assert found["map_hard"] == pytest.approx(mean(("hard",), ("easy", "junk")), rel=1e-12)


def test_a_perfect_ranking_has_all_the_precision_and_none_has_no_number() -> None:
    first = np.arange(3)
    assert average_precision(np.arange(10), first, np.empty(0, np.int64)) == 1.0
    assert math.isnan(average_precision(np.arange(10), np.empty(0, np.int64), first))
